"""OpenAI's HTTP interface, thin: validation, text to tokens and back, server-sent events, metrics.

app.py         the application: routes, limits, life
requests.py    bodies of requests, with what is legal
responses.py   bodies of answers
errors.py      every error as OpenAI's error object
generation.py  chat and text completions
embeddings.py  embeddings of a `features` bundle
operations.py  health, readiness, metrics, models, tokenize, detokenize, the page
security.py    API keys and the size of bodies
offload.py     threads for what takes long
rest.py        memory goes back while nobody asks for anything
metrics.py     Prometheus
"""
