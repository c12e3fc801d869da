"""`lightning-namo report`: what runs logged, as one HTML page and a Markdown summary."""
