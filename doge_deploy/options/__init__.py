"""What a user chose: defaults, then a YAML file, then `--set`, then command-line options.

export.py     ExportOptions
build.py      BuildOptions
load.py       options from their sources, and from Python; what is wrong with them in one line
yaml_text.py  YAML, read safely and strictly
backends.py   names of what can run a bundle
"""
