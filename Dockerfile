FROM python:3.13-slim

# The default grace of 10 seconds is all the time that `docker stop` leaves before it kills.
ENV PYTHONUNBUFFERED=1 \
    DOCS_DATA_DIR=/data \
    DOCS_SHUTDOWN_SECONDS=8

WORKDIR /app

COPY requirements.txt ./
RUN sed -i '/^# Tests/,$d' requirements.txt && pip install --no-cache-dir -r requirements.txt

# The mode, in case the umask of the clone lets nobody else read. The import, which opens no file, fails here if
# anything is missing, and leaves the bytecode that the user below could not write.
COPY main.py auth.py db.py storage.py ./
RUN chmod a+r ./*.py && python -c 'import main'

RUN install -d -m 0700 -o 10001 -g 10001 /data
VOLUME /data
USER 10001:10001

EXPOSE 8000

# Not /readyz: a full disk is no reason to replace a container that still serves. And never through a proxy, which the
# docker client may put into the environment.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "from urllib.request import ProxyHandler, build_opener; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/healthz', timeout=4)"]

CMD ["uvicorn", "main:app", "--host", "0.0.0.0", "--port", "8000"]
