"""Structured output: a JSON schema, a regular expression, choices or a Lark grammar decide which tokens may come.

Reference: https://github.com/guidance-ai/llguidance (which does the work).
"""
