"""What the scripts share: encoders, memories, heads. One network is encoder -> memory -> heads."""
from models.cpu import keep_freed_memory
from models.encoder import Encoder, init, to_tensors
from models.heads import PolicyHead, QHead
from models.memory import MEMORIES
from models.running_stats import RunningMeanStd
from models.scan import linear_scan

__all__ = ["MEMORIES", "Encoder", "PolicyHead", "QHead", "RunningMeanStd", "init", "keep_freed_memory",
           "linear_scan", "to_tensors"]
