"""The model card of an export: what the run's folder knows, and nothing that it does not."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from exchange.architectures import MODEL_TYPES, architecture_of
from exchange.origin import Origin
from harness.report.text import markdown_table
from harness.run.files import read_json
from harness.run.model_size import count_parameters
from harness.run.provenance import RunRecord
from harness.run.run_folder import RunFolder
from harness.run.score import Score

CHART = "loss.png"
LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})
inputs = tokenizer("Every effort moves you", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20, do_sample=True, top_k=25)[0]))
```
"""
LOADING_WITHOUT_TOKENIZER = """\
```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({place})
```

There is no tokenizer in this folder: the model's ids are not those of the GPT-2 encoding.
"""


Interval = tuple[float, float] | None
"""95% interval of a test loss that the choice of test text leaves; None where nothing is known."""


@dataclass(frozen=True)
class Publication:
    """What a card says besides what the run knows."""

    repository: str | None
    licence: str | None
    has_tokenizer: bool
    has_chart: bool


def model_card(
    folder: RunFolder, step: int, scores: Iterable[tuple[Score, Interval]], publication: Publication
) -> str:
    """Return the README.md of a checkpoint: YAML front matter, then Markdown."""
    name = (publication.repository or folder.path.name).rpartition("/")[2]
    place = json.dumps(publication.repository or "path/to/this/folder")
    architecture = architecture_of(folder.read_configs()[0], folder.model_json)
    loading = LOADING if publication.has_tokenizer else LOADING_WITHOUT_TOKENIZER
    parts = [
        _front_matter(folder, publication),
        f"# {name}\n\n{_summary(folder)}",
        f"## How to load\n\nA stock `{architecture}`; no remote code is needed.\n\n{loading.format(place=place)}",
        _section("Training", _table(["", ""], _training(folder, step))),
        "![Mean train loss of every global step](loss.png)\n" if publication.has_chart else "",
        _section("Test loss", _test_losses(scores)),
        _section("Configuration", _configuration(folder)),
        f"## Licence\n\n{publication.licence}\n" if publication.licence else "",
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(folder: RunFolder, publication: Publication) -> str:
    """Return the metadata that the Hub reads; every value is quoted as JSON, which YAML includes."""
    source = _source(folder)
    model, _ = folder.read_configs()
    tags = [MODEL_TYPES.get(architecture_of(model, folder.model_json), "gpt2")]
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if publication.licence:
        fields["license"] = publication.licence
    if _was_trained(folder) and (on_hub := [name for name, _ in _datasets(_ran(folder)) if "/" in name]):
        fields["datasets"] = on_hub
    if source.startswith("hf:"):
        fields["base_model"] = source.removeprefix("hf:")
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _summary(folder: RunFolder) -> str:
    model, _ = folder.read_configs()
    head = "shared with" if model.tie_weights else "separate from"
    begun = "It started from the weights of" if _was_trained(folder) else "Its weights are those of"
    start = f" {begun} `{source}`." if (source := _source(folder)) else ""
    return (
        f"A GPT-2-style language model with {count_parameters(model).total:,} parameters: {model.n_layers} layers, "
        f"{model.n_heads} heads, {model.emb_dim} channels, a context of {model.context_length:,} tokens, "
        f"{model.vocab_size:,} token ids, and an output head {head} the token embedding.{start}\n"
    )


def _source(folder: RunFolder) -> str:
    """Return the model on the Hub (hf:OWNER/NAME) whose weights the run began with; empty where there is none."""
    source = Origin.read(folder.imported_source).source
    return source if re.fullmatch(r"hf:[\w.-]+(/[\w.-]+)?", source) else ""


def _was_trained(folder: RunFolder) -> bool:
    return folder.run_json.is_file()


def _ran(folder: RunFolder) -> dict[str, Any]:
    """Return the train.json that ran, or would run, without keys that are null."""
    written = RunRecord.read(folder.run_json).train or asdict(folder.read_configs()[1])
    unused = {"notes"}  # which may be private
    if written.get("global_batch_size"):
        unused.add("gradient_accumulation_steps")
    return {key: value for key, value in written.items() if value is not None and key not in unused}


def _datasets(ran: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the names of the datasets in a train.json, with weight and revision in words."""
    dataset = ran.get("dataset", [])
    single = {"name": dataset, "revision": ran.get("dataset_revision")}
    parts: list[dict[str, Any]] = [single] if isinstance(dataset, str) else dataset
    return [
        (
            part["name"],
            (f" at `{part['revision']}`" if part.get("revision") else "")
            + (f" with weight {part['weight']:g}" if "weight" in part else ""),
        )
        for part in parts
    ]


def _training(folder: RunFolder, step: int) -> list[tuple[str, str]]:
    """Return the rows (label, value) about how a checkpoint was trained; none for imported weights."""
    if not _was_trained(folder):
        return []
    run, ran = RunRecord.read(folder.run_json), _ran(folder)
    state, plan = read_json(folder.state_json(step)).get("train_state", {}), run.plan
    line: dict[str, Any] = next((line for line in folder.metrics.read() if line.get("step") == step), {})
    names = _datasets(ran)
    rows = [("Data", ", ".join(f"`{name}`{described}" for name, described in names))]
    rows += [
        (
            "Train split" if len(names) == 1 else f"Train split of {name}",
            f"{check['count']:,} tokens from token {check['start']:,}, SHA-256 `{check['sha256']}`",
        )
        for (name, _), check in zip(names, run.dataset, strict=False)
    ]
    if state:
        batch = f" of {plan['global_batch']:,} sequences" if "global_batch" in plan else ""
        steps = f"{state['next_step']:,} global step{'s' if state['next_step'] > 1 else ''}"
        rows.append(("Tokens seen", f"{state['tokens']:,}, in {steps}{batch}"))
        rows.append(("Time", _duration(state["elapsed_seconds"])))
    rows.append(("Hardware", _hardware(folder)))
    if line.get("cost") is not None:
        rows.append(("Cost", f"{line['cost']:,.2f} {ran.get('currency', '')}".rstrip()))
    if (loss := state.get("last_interval_loss")) is not None:
        rows.append(("Train loss", f"{loss:.4f} nats per token, the mean over a checkpoint interval"))
    rows.append(("Software", _software(folder)))
    return [(label, value) for label, value in rows if value]


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} hours" if seconds >= 3600 else f"{seconds:,.1f} seconds"


def _hardware(folder: RunFolder) -> str:
    """Return the different sets of devices that the run was trained on, in order."""
    found: list[str] = []
    for start in RunRecord.read(folder.run_json).starts:
        devices = start.get("devices", [])
        named = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
        if named and named not in found:
            found.append(named)
    return "; then ".join(found)


def _software(folder: RunFolder) -> str:
    starts = RunRecord.read(folder.run_json).starts
    last = starts[-1] if starts else {}
    versions = last.get("versions") or {}
    named = [f"{name} {versions[name]}" for name in ("python", "torch") if name in versions]
    commit = (last.get("code") or {}).get("commit")
    return ", ".join([*named, *([f"code at commit `{commit}`"] if commit else [])])


def _test_losses(scores: Iterable[tuple[Score, Interval]]) -> str:
    rows = [
        (
            f"`{score.dataset}`, {score.split}, {score.tokens:,} tokens from token {score.start_token:,}",
            f"{score.loss:.6f}",
            "" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}",
        )
        for score, interval in scores
    ]
    if not rows:
        return ""
    table = _table(["test tokens", "loss (nats per token)", "95% interval", "bits per byte"], rows)
    return (
        f"{table}\nThe interval covers the choice of test text, clustered by document. It does not cover the choice "
        "of training seeds.\n"
    )


def _configuration(folder: RunFolder) -> str:
    model, _ = folder.read_configs()
    blocks = [f"`model.json`:\n\n{_json_block(asdict(model))}"]
    if _was_trained(folder):
        blocks.append(f"`train.json`:\n\n{_json_block(_ran(folder))}")
    return "\n".join(blocks)


def _json_block(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2)}\n```\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(headings: list[str], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table in which no name from elsewhere is markup."""
    cells = [tuple(escape(cell, quote=False) for cell in row) for row in rows]
    return "\n".join(markdown_table(headings, cells)) + "\n" if rows else ""
