"""What stands on the co-attention: is it a match, which word, which answer."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from adapters.vqa.co_attention import initialise


class WordHead(nn.Module):
    """States of tokens into logits of the vocabulary, as in BERT.

    Args:
        width: Of the states.
        num_tokens: Size of the vocabulary.
    """

    def __init__(self, width: int, num_tokens: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.decoder = nn.Linear(width, num_tokens)
        initialise(self, width)

    def forward(self, states: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens _"]:
        """Return logits."""
        return self.decoder(self.norm(F.gelu(self.dense(states))))


class AnswerHead(nn.Module):
    """A pooled pair into logits of the answers: METER's MLP with a norm between.

    Args:
        width: Of the pooled pair.
        num_answers: Size of the answer vocabulary.
    """

    def __init__(self, width: int, num_answers: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, num_answers)
        initialise(self, width)

    def forward(self, pooled: Float[Tensor, "pairs width"]) -> Float[Tensor, "pairs _"]:
        """Return logits."""
        return self.fc2(F.gelu(self.norm(self.fc1(pooled))))


def matching_head(width: int) -> nn.Linear:
    """Return what tells a pair that matches, output 1, from one that does not, output 0."""
    head = nn.Linear(width, 2)
    initialise(head, width)
    return head
