"""GPT-2 for the recipes: model, LightningModule and data."""
