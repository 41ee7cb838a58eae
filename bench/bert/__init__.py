"""Parts of `bench/bert_pretrain.py`, one subject a file; they import each other and torch, never the script."""
