"""An OpenAI-compatible server for one model.

command.py   `unimoe serve`: flags, loading, signals
app.py       HTTP: routes, errors, streaming, disconnects
protocol.py  schemas of requests and responses
gate.py      what a request must pass before it is read: host, key, size and time of its body
connections.py  deadlines of connections
media.py     from content parts to decoded media, within limits
decoding.py  processes that decode, killed when they take too long; decode_worker.py is what they run
engine.py    one thread that batches all answers continuously
batch.py     its tensors: chunked prefill, and a KV cache that rows join and leave
answer.py    the state of one answer: sampling, log-probabilities, stopping
text.py      from tokens to text, and stop strings
metrics.py   counters for Prometheus
"""
