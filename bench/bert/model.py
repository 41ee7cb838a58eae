"""BERT with its masked language model head, from a configuration; nothing comes from the hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM


class MaskedLanguageModel(nn.Module):
    """Token ids and masked positions in, the loss of each sequence (summed over its masked tokens) out.

    The head runs on the masked positions only: with 15 % of the tokens masked and a vocabulary of 30,000, the logits of
    the others would be most of the work and of the memory, and are multiplied by zero.
    """

    def __init__(self, vocab_size: int, layers: int, hidden: int, heads: int, positions: int, dropout: float):
        super().__init__()
        config = BertConfig(
            vocab_size=vocab_size,
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=positions,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.lm = BertForMaskedLM(config)

    def forward(self, ids: torch.Tensor, at: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.lm.bert(ids).last_hidden_state
        hidden = hidden.take_along_dim(at.unsqueeze(-1), dim=1)
        logits = self.lm.cls(hidden).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(at).sum(1)
