"""What lies on disk: a directory with graphs, weights, engines and the manifest that describes them.

signature.py      every graph input and output: name, dtype, axes
manifest.py       the directory: manifest and hashes
writing.py        putting a bundle in its place, whole or not at all
locks.py          who is writing to a folder
engine_record.py  EngineRecord: what a bundle says about an engine that was built from it
engine_store.py   engines in a bundle: put there whole, or not at all
genai_config.py   what onnxruntime-genai must know of the growing graph

This file imports none of them: a command loads only what it uses.
"""
