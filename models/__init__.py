"""What the scripts share: encoders, memories, heads. One network is encoder -> memory -> heads."""
from models.cpu_speed import keep_freed_memory
from models.distributions import SquashedGaussian
from models.encoder import Encoder, to_tensors
from models.heads import PolicyHead, QHead
from models.layers import init, mlp
from models.memory import MEMORIES
from models.running_stats import RunningMeanStd
from models.scan import linear_scan
from models.trunks import Trunk, Trunks

__all__ = ["MEMORIES", "Encoder", "PolicyHead", "QHead", "RunningMeanStd", "SquashedGaussian",
           "Trunk", "Trunks", "init", "keep_freed_memory", "linear_scan", "mlp", "to_tensors"]
