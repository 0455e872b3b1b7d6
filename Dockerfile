# The image that docs/pods.md runs on TPU hosts: the wheel with all of its commands. docker build -t IMAGE .
FROM python:3.12-slim AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir dist .

FROM python:3.12-slim
ENV PYTHONUNBUFFERED=1
WORKDIR /dsv2
# The layer of the dependencies does not depend on the code, so a change of the code does not rebuild it.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt "jax[tpu]"
COPY --from=wheel /src/dist dist
RUN pip install --no-cache-dir "$(echo dist/*.whl)[tpu,gcs]" && rm -r dist
# A list and not a shell command, so that SIGTERM reaches Python, which then saves.
CMD ["dsv2-train", "--help"]
