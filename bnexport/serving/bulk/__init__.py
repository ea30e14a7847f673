"""Predictions for many images: folders, arrays and Parquet in, Parquet out, shard by shard."""
