"""The training command: hyper-search, CSLA validation and target training, on timm's factories."""
