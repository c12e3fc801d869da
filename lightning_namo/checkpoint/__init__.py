"""State dicts that load again under another strategy or number of ranks, or are refused before anything is loaded.

Two forms are in use. The plain form is what the optimizer keeps (``momentum_buffer``, ``v``, ``step``, ``skipped``;
AdamW's ``exp_avg``, ``exp_avg_sq``, ``step``). FSDP1 gathers and cuts only state that is shaped like its parameter, and
the same keys for all parameters of a unit; so state saved under it has the *flat form*: ``momentum_buffer`` and
``exp_avg_sq`` for every parameter, v spread over its matrix, beside the scalars. Both forms load everywhere.
"""
