# LucidPrune on NVIDIA's PyTorch image, which brings PyTorch, torchvision and NCCL; DALI is installed where it does not.
#
#   docker build -t lucidprune:0.1.0 .
#   docker run --rm -it --gpus all --ipc=host --ulimit memlock=-1 --ulimit stack=67108864 \
#     -v /data/imagenet:/data/imagenet:ro -v "$PWD/runs:/runs" lucidprune:0.1.0 \
#     python ./multiproc.py --nproc_per_node gpu ./main.py /data/imagenet --workspace /runs
#
# Any user may run it: `--user "$(id -u):$(id -g)"`.
ARG NGC_PYTORCH=26.06-py3
FROM nvcr.io/nvidia/pytorch:${NGC_PYTORCH}

WORKDIR /workspace/lucidprune

# The dependencies first: a change of our code does not install them again.
COPY pyproject.toml ./
COPY docker/install.sh docker/requirements.py docker/
RUN docker/install.sh dependencies

COPY . .
RUN docker/install.sh package

# A user without an entry in /etc/passwd still needs a name, a home, and a place for generated and prepared data.
RUN mkdir -p /cache /home/lucidprune && chmod 1777 /cache /home/lucidprune
ENV HOME=/home/lucidprune \
    USER=lucidprune \
    LUCIDPRUNE_CACHE=/cache \
    PYTHONUNBUFFERED=1

# The launcher gives the ranks 120 s after this to save.
STOPSIGNAL SIGTERM
CMD ["python", "./main.py", "--help"]
