import interpreter  # noqa: F401  (repairs bfloat16 in Triton's interpreter)
import torch

torch.set_num_threads(1)
