"""How fast a bundle is, beside what else runs the same checkpoint.

workload.py   what is timed, and the same token ids for everyone
measure.py    the timed sections; nothing else runs in them
candidates.py whatever can be timed, behind `doge_deploy.runtime.base.Runner`
baselines/    transformers in eager mode; a plain export of it
worker.py     the process that one candidate lives in
process.py    the other end of that process
schedule.py   the order of candidates, rotated from round to round
roofline.py   memory bandwidth
machine.py    what the numbers were measured on
run.py        the order of a benchmark, and nothing else
report.py     medians, ratios and their spread
plot.py       a PNG of a report
"""
