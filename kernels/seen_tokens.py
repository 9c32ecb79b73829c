"""The tokens that a request's prompt and output have: a list of (token, code) on the host, kept up to date.

code = 2 · the token's count in the output, plus 1 if the prompt has it. There is at least one token. A list is int32
[1 + capacity, 2]; its first row is (number of entries, 0). One entry a token, in no order.

R lists, S rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorafleet.kernels.native import library


def token_codes(token_ids: Sequence[int], num_prompt_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens of a prompt and the output after it, each once, int64, and their codes, int32."""
    ids = torch.tensor(token_ids, dtype=torch.int64)
    codes = 2 * torch.bincount(ids[num_prompt_tokens:], minlength=int(ids.max()) + 1)
    codes[ids[:num_prompt_tokens].unique()] += 1
    seen = codes.nonzero()[:, 0]
    return seen, codes[seen].int()


def seen_tokens(token_ids: Sequence[int], num_prompt_tokens: int, max_more: int) -> torch.Tensor:
    """Return the list of a prompt and the output after it, with room for `max_more` tokens."""
    seen, codes = token_codes(token_ids, num_prompt_tokens)
    tokens_C2 = torch.empty(1 + len(seen) + max_more, 2, dtype=torch.int32)  # memory is taken when it is written
    tokens_C2[0, 0], tokens_C2[0, 1] = len(seen), 0
    own_C2 = tokens_C2[1 : 1 + len(seen)]
    own_C2[:, 0], own_C2[:, 1] = seen, codes
    return tokens_C2


def add_sampled_(lists: Sequence[torch.Tensor], row_R: torch.Tensor, token_ids_S: torch.Tensor) -> None:
    """Add to each list the token that its row, int64, has got. Each needs room for one more."""
    native = library()
    if native is None:
        add_sampled_reference_(lists, row_R, token_ids_S)
        return
    assert row_R.dtype == token_ids_S.dtype == torch.int64 and token_ids_S.is_contiguous()
    at_R = addresses(lists)
    native.lf_add_sampled(at_R.data_ptr(), row_R.data_ptr(), token_ids_S.data_ptr(), len(lists))


def add_sampled_reference_(lists: Sequence[torch.Tensor], row_R: torch.Tensor, token_ids_S: torch.Tensor) -> None:
    for tokens_C2, token_id in zip(lists, token_ids_S[row_R].tolist(), strict=True):
        count = int(tokens_C2[0, 0])
        place = (tokens_C2[1 : 1 + count, 0] == token_id).nonzero()[:, 0]
        if len(place):
            tokens_C2[1 + place, 1] += 2
        else:
            tokens_C2[1 + count] = torch.tensor([token_id, 2], dtype=torch.int32)
            tokens_C2[0, 0] += 1


def addresses(lists: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the lists' addresses, int64."""
    return torch.tensor([tokens_C2.data_ptr() for tokens_C2 in lists], dtype=torch.int64)
