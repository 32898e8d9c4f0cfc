"""The parts of the detection demo that are not specific to distributed training."""
