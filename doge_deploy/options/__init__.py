"""What a user chose: defaults, then a YAML file, then `--set`, then command-line options.

export.py    ExportOptions
build.py     BuildOptions
backends.py  names of what can run a bundle
"""
