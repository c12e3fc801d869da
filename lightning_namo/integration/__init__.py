"""From a LightningModule, Fabric or plain PyTorch to the optimizer; callbacks, clipping, pre-emption, run card."""
