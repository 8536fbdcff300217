"""The classes that the tables of a recipe become: the passes, and the objects that are their fields."""

from __future__ import annotations

from typing import Any

from ..context.longrope import LongRope
from ..context.scale_rope import ChooseRope, ScaleRope
from ..distillation.distill import Distill
from ..distillation.divergences import Loss
from ..distillation.hidden_losses import HiddenLoss
from ..distillation.lora import LoRA
from ..distillation.schedule import Ramp
from ..distillation.training import Training
from ..pruning.drop import Drop
from ..pruning.prune import Prune
from ..pruning.prune_ffn import PruneFFN
from ..pruning.slice import Slice
from ..quantization.autoround import AutoRound
from ..quantization.awq import AWQ
from ..quantization.block_tuning import BlockTuning
from ..quantization.embedding import QuantizeEmbedding
from ..quantization.gptq import GPTQ
from ..quantization.hqq import HQQ
from ..quantization.mixed_bits import MixedBits
from ..quantization.rotate import Rotate
from ..quantization.rtn import RTN
from ..quantization.smoothquant import SmoothQuant
from .vocabulary import Data, Export

ALL = (
    *(AWQ, GPTQ, HQQ, RTN, AutoRound, ChooseRope, Distill, Drop, LongRope, MixedBits, Prune, PruneFFN),
    *(QuantizeEmbedding, Rotate, ScaleRope, Slice, SmoothQuant),
    *(Training, LoRA, Loss, HiddenLoss, Ramp, BlockTuning),
    *(Data, Export),
)
CLASSES: dict[str, type[Any]] = {kind.__name__: kind for kind in ALL}
