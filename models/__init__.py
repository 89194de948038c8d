"""What the scripts share: encoders, memories, heads. One network is encoder -> memory -> heads."""
from models.encoder import Encoder, init, to_tensors
from models.heads import PolicyHead
from models.memory import MEMORIES
from models.running_stats import RunningMeanStd

__all__ = ["MEMORIES", "Encoder", "PolicyHead", "RunningMeanStd", "init", "to_tensors"]
