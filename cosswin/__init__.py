"""CoSwin, the backbone of Florence, for images and clips; importing this registers it with timm."""

from cosswin.attention import WindowAttention as WindowAttention
from cosswin.embedding import ConvEmbedding as ConvEmbedding
from cosswin.embedding import ConvShape as ConvShape
from cosswin.model import CoSwin as CoSwin
from cosswin.resize import carry_weights as carry_weights
from cosswin.stage import Block as Block
from cosswin.stage import Stage as Stage
from cosswin.variants import coswin_base as coswin_base
from cosswin.variants import coswin_base_window12_384 as coswin_base_window12_384
from cosswin.variants import coswin_huge as coswin_huge
from cosswin.variants import coswin_huge_window12_384 as coswin_huge_window12_384
from cosswin.variants import coswin_large as coswin_large
from cosswin.variants import coswin_large_window12_384 as coswin_large_window12_384
from cosswin.variants import coswin_nano as coswin_nano
from cosswin.variants import coswin_small as coswin_small
from cosswin.variants import coswin_small_window12_384 as coswin_small_window12_384
from cosswin.variants import coswin_tiny as coswin_tiny
from cosswin.variants import coswin_tiny_window12_384 as coswin_tiny_window12_384
from cosswin.variants import coswin_xlarge as coswin_xlarge
from cosswin.variants import coswin_xlarge_window12_384 as coswin_xlarge_window12_384

__all__ = [
    "Block",
    "CoSwin",
    "ConvEmbedding",
    "ConvShape",
    "Stage",
    "WindowAttention",
    "carry_weights",
    "coswin_base",
    "coswin_base_window12_384",
    "coswin_huge",
    "coswin_huge_window12_384",
    "coswin_large",
    "coswin_large_window12_384",
    "coswin_nano",
    "coswin_small",
    "coswin_small_window12_384",
    "coswin_tiny",
    "coswin_tiny_window12_384",
    "coswin_xlarge",
    "coswin_xlarge_window12_384",
]
