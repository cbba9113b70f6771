"""An OpenAI-compatible server for one model.

command.py   `unimoe serve`: flags, loading, signals
app.py       HTTP: routes, errors, streaming, disconnects
protocol.py  schemas of requests and responses
media.py     from content parts to checked media, within limits
engine.py    one thread that batches all answers continuously
batch.py     its tensors: chunked prefill, and a KV cache that rows join and leave
answer.py    the state of one answer: sampling, log-probabilities, stopping
text.py      from tokens to text, and stop strings
metrics.py   counters for Prometheus
"""
