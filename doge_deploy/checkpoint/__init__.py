"""Find, read and check a checkpoint; name everything that is wrong with a bad one.

find.py       which directory a MODEL is
headers.py    tensor names, dtypes, shapes and places, read from safetensors headers
names.py      the tensors that a Doge must have
legacy.py     checkpoints of the original SmallDoge code
wrappers.py   names that a wrapper around the model put before those of its tensors
adapter.py    a PEFT LoRA adapter, merged as peft merges it
tensors.py    bytes and numbers of one stored tensor
read.py       `Checkpoint` and `open_checkpoint`
finite.py     NaN, infinities, and values beyond a dtype
score_range.py  whether the dynamic mask's score can overflow

Nothing of a checkpoint is run and nothing is unpickled.
"""

from doge_deploy.checkpoint.find import BUNDLED_MODELS, find_checkpoint
from doge_deploy.checkpoint.finite import check_finite
from doge_deploy.checkpoint.headers import TensorInfo
from doge_deploy.checkpoint.names import expected_tensors, task_tensors
from doge_deploy.checkpoint.read import Checkpoint, open_checkpoint
from doge_deploy.checkpoint.score_range import check_score_range

__all__ = [
    "BUNDLED_MODELS",
    "Checkpoint",
    "TensorInfo",
    "check_finite",
    "check_score_range",
    "expected_tensors",
    "find_checkpoint",
    "open_checkpoint",
    "task_tensors",
]
