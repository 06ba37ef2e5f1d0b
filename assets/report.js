// Two things move: which curves are shown, and which step's samples. A page that reloads itself keeps what was chosen.
const kept = (() => { try { return sessionStorage; } catch { return {}; } })();
const hidden = new Set(JSON.parse(kept.hidden ?? "[]"));
for (const box of document.querySelectorAll(".legend input")) {
  const label = box.closest("label").textContent;
  const show = () => {
    document.querySelector(`.curve[data-recipe="${box.value}"]`).classList.toggle("hidden", !box.checked);
    hidden[box.checked ? "delete" : "add"](label);
    kept.hidden = JSON.stringify([...hidden]);
  };
  box.checked = !hidden.has(label);
  box.addEventListener("change", show);
  show();
}
const slider = document.querySelector("#step");
if (slider) {
  const samples = [...document.querySelectorAll(".samples article")];
  const steps = JSON.parse(slider.dataset.steps);
  const show = () => {
    const step = steps[slider.value];
    document.querySelector("#step-shown").textContent = step.toLocaleString("en");
    for (const article of samples) {
      const texts = JSON.parse(article.dataset.texts);
      const seen = texts.filter(([at]) => at <= step);
      article.querySelector("pre").textContent = seen.length ? seen[seen.length - 1][1] : "–";
    }
  };
  const chosen = steps.indexOf(Number(kept.step));
  slider.value = chosen < 0 ? steps.length - 1 : chosen;
  slider.addEventListener("input", () => {
    show();
    kept.step = steps[slider.value];
  });
  show();
}
