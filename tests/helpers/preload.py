# ruff: noqa: F401
"""What the server of `launch` imports, once for all processes that are forked from it. Nothing here starts a thread."""

import gc

import torch._dynamo
import torch.distributed.run
import torch.utils.tensorboard

import lightning_namo.cli.entry_point
import lightning_namo.gpt2.summary
from tests.helpers import job, layouts, resuming, worker

gc.freeze()  # what is here stays: no child's collector goes through it
