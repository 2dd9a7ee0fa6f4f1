"""What a checkpoint is: facts that are read, never chosen.

model.py         DogeFacts, every fact of a config.json
keys.py          which keys a config.json may have; typed access that collects what is wrong
rope.py          the RoPE part of a config.json, in one form whatever form it was written in
revisions.py     the revisions of the architecture and what tells them apart in a graph
published.py     configs of the published sizes, for questions that need no checkpoint
expert_pairs.py  the pairs of ranks that a mixture of experts forms
"""
