"""The shapes under which users meet the tables: modules like those of torch.nn, torchrec's collections, any model."""
