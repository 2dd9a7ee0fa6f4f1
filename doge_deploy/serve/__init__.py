"""A server for bundles: requests that share the rows of one static cache, behind OpenAI's HTTP interface.

request.py      Request: one object with a state, and the events it reports
slots.py        which request has which slot, and what the slots hold
scheduler.py    continuous batching: admit, decode, prefill; without a clock and without a thread
speculation.py  n-gram drafts, and how long they should be
"""
