"""What a step would cost on many ranks: computed, not measured."""
