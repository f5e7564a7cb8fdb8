"""For tests on a GPU: the architecture that model files must carry machine code for."""

from typing import Tuple

import torch

from mlff.compile import ARCHITECTURES


def architectures() -> Tuple[int, ...]:
    """That of the first GPU, for mlff.export.build_payload; none without a GPU, where nothing is compiled."""
    if not torch.cuda.is_available():
        return ()
    major, minor = torch.cuda.get_device_capability()
    fitting = [a for a in ARCHITECTURES if a // 10 == major and a % 10 <= minor]
    return (max(fitting),) if fitting else (min(ARCHITECTURES),)  # else by its PTX
