"""What the training loop is made of: step, optimizer, checkpoint, run state, curves."""
