# A GPU machine needs NVIDIA's driver and container toolkit only: torch's wheels bring the CUDA libraries.
#   docker build -t gpt2-harness .
#   docker run --gpus all --ipc host -v "$PWD/runs:/harness/runs" -v "$PWD/datasets:/harness/datasets" \
#     gpt2-harness torchrun --standalone --nproc_per_node=gpu ddp_train.py quickstart datasets
FROM python:3.12-slim

# torch.compile needs a C compiler, run.json the commit.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /harness
# Packages change less often than code, so they have a layer of their own.
COPY pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --editable ".[data,tensorboard,wandb,trackio,notify]"
COPY . .

# Files in mounted folders then belong to a user, not to root: build with --build-arg UID=$(id -u) for yours.
ARG UID=1000
RUN useradd --uid "$UID" --create-home harness && chown -R harness /harness
USER $UID
CMD ["python", "ddp_train.py", "--help"]
