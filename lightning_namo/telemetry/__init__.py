"""What optimizers report while they train, and what it says of the noise in their gradients."""
