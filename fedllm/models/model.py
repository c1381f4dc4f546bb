"""A language model with a trainable space: one frozen base, run for K clients' trainables in one forward."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedllm.core.errors import CompositionError, ModelError
from fedllm.core.payload import Tree
from fedllm.core.rng import torch_stream
from fedllm.data.encode import Encoded
from fedllm.models.batch import Batch
from fedllm.models.blocks import quicken
from fedllm.models.dual import TEXT, VISION, DualEncoder, inside
from fedllm.models.encoder import HeadedEncoder as HeadedEncoder
from fedllm.models.encoder import Pooling as Pooling
from fedllm.models.heads import Head
from fedllm.models.hidden import WORTH, by_length, densely, hidden
from fedllm.models.kernels import fast, keep_freed_memory, repeatable
from fedllm.models.pairs import PairNet
from fedllm.models.pictures import with_features
from fedllm.models.pieces import target_logits, word_losses
from fedllm.models.places import positions_of
from fedllm.models.plain import are_weights, put_in, swapped, unpatched
from fedllm.models.settled import is_settled, part_of, with_states
from fedllm.models.shop import ShopNet
from fedllm.models.ways import Ways
from fedllm.spaces.space import Space, Stack, fitted_to, stack_lanes, tree_to
from fedllm.tasks.registry import task_of
from fedllm.tasks.task import Task, wide

log = logging.getLogger(__name__)

RowLoss = Callable[["Model", Batch], tuple[Tensor, Tensor, Tensor]]


class Model:
    """What client code and servers see of a model: its space, its tokenizer, and losses for stacked lanes."""

    def __init__(self, net: nn.Module, tokenizer: PreTrainedTokenizerBase | None, task: str, space: Space, *,
                 labels: Sequence[str] = (), seed: int = 0, fast_kernels: bool = True, name: str = "",
                 loss: RowLoss | None = None, images: Any = None, weights: str = "pretrained") -> None:
        """`loss` takes the place of the task's own (see `row_losses`), for nets that are no language model; `images`
        is an image processor, for those that see; `weights` says whether the net is as its folder `name` holds it, or
        was drawn by the seed."""
        self.net, self.tokenizer, self.task, self.space, self.images = net, tokenizer, task, space, images
        self.rules = task_of(task)
        self.labels, self.seed, self.name = tuple(labels), seed, name
        self.silent = ""  # why it cannot continue texts, where it cannot
        self.share = 1.0  # how much of the owner's blocks it has: a step takes so much of the whole model's time
        self.dense, self.worth = 0, WORTH  # weights of a layer, where padding may be left out; and when it pays
        self.said: list[str] = []
        """What its user must know: what is not done as the config has it, and which quicker ways it does not take."""
        self.weights, self.loss = weights, loss
        self.net.eval().requires_grad_(False)
        if self.device.type == "cuda":
            repeatable()
        if self.rules.net in ("masked", "dual") and space.virtual:
            raise CompositionError(f"space '{space.stem}' puts virtual tokens before the text, and data.task "
                                   f"= {task!r} has no place for them; 'lora' works")
        if self.room < 2:
            raise ModelError(f"space '{space.stem}' takes {space.places} places before the text, and "
                             f"{name or type(net).__name__} has {self.positions} in all; allowed is a length of "
                             f"{self.positions - 2} at most")
        self.stack = Stack(causal=self.rules.net == "causal")
        self.start: Tree | None = None  # trainables to start from (an adapter that was loaded) in place of fresh ones
        self._start_net()
        self._set_up(Ways(quick=fast_kernels))

    def go(self, ways: Ways) -> None:
        """Run in these ways from now on, on the very same weights."""
        self.net = unpatched(self.net)
        self._set_up(ways)

    def tell(self, sentences: Sequence[str]) -> None:
        """Say this in the log, once, and keep it for the record."""
        for sentence in sentences:
            if sentence not in self.said:
                self.said.append(sentence)
                log.warning(sentence)

    def _set_up(self, ways: Ways) -> None:
        self.ways, self.fast_kernels, self.stack.quick = ways, ways.quick, ways.quick
        if ways.quick:
            keep_freed_memory()
            quicken(self.net.body if isinstance(self.net, HeadedEncoder) else self.net)
        self.dense = densely(self.net) if ways.quick and self.rules.net == "causal" and self.space.by_token else 0
        self.head = Head(self.net) if self.rules.net == "causal" and self._is_language_model() else None
        if ways.sites:
            self.stackable = self.space.install(self.net, self.stack) and ways.together
        else:
            self.bare, self.stackable = unpatched(self.net), False
            if not are_weights(self.space):
                self.space.install(self.net, self.stack)

    def _is_language_model(self) -> bool:
        return isinstance(self.net, PreTrainedModel) and isinstance(self.net.get_output_embeddings(), nn.Module)

    def _start_net(self) -> None:
        if isinstance(self.net, HeadedEncoder):
            from fedllm.spaces.head import classifier_start

            classifier_start(self.net.classifier, torch_stream(self.seed, "classifier"))
        if isinstance(self.net, DualEncoder):
            self.net.attend.start(torch_stream(self.seed, "attention"))

    def initial(self, rank: int | None = None) -> Tree:
        """The starting trainables (fp32 or wider), in host memory; the same for the same seed."""
        fresh = tree_to(self.space.start(self.net, torch_stream(self.seed, "start"), rank), "cpu")
        return fresh if self.start is None else fitted_to(self.start, fresh)

    def withheld(self, payload: Mapping[str, Any]) -> tuple[str, str] | None:
        """(key, stream) of a personal stream's tensor in a payload, by its name; None where there is none.

        A name that other streams have too is a personal one's where the key's path says so (`delta/tau/<name>`).
        """
        personal = self.space.personal
        for key in payload if personal else ():
            *path, name = key.split("/")
            mine = [s for s in self._streams.get(name, ()) if s in personal]
            if mine and (said := [s for s in mine if s in path] or (
                    mine if len(mine) == len(self._streams[name]) else [])):
                return key, said[0]
        return None

    @functools.cached_property
    def _streams(self) -> dict[str, list[str]]:
        """Names within streams -> the streams that have such a trainable."""
        out: dict[str, list[str]] = {}
        for full in self.initial():
            stream, _, name = full.partition("/")
            out.setdefault(name, []).append(stream)
        return out

    @functools.cached_property
    def words(self) -> Tensor:
        """The token embeddings [V, d], as they are stored, in host memory."""
        return self.net.get_input_embeddings().weight.detach().cpu()

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @functools.cached_property
    def positions(self) -> int:
        """Tokens that the network has places for, virtual ones among them; a large number where it sets no bound."""
        return positions_of(self.net)

    @property
    def room(self) -> int:
        """Tokens of a text that there are places for, behind what the space puts before it."""
        return self.positions - self.space.places

    @functools.cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer: the tokenizer's, and all that the model's generation_config names."""
        own = getattr(self.net, "generation_config", None)
        said = (self.tokenizer and self.tokenizer.eos_token_id, own and own.eos_token_id)
        ends = [t for s in said if s is not None for t in (s if isinstance(s, list | tuple) else [s])]
        if odd := [t for t in ends if not isinstance(t, int)]:
            raise ModelError(f"model {self.name!r}: the eos_token_id of its generation_config is {odd[0]!r:.80}; "
                             "allowed are numbers of tokens")
        return set(ends)

    @property
    def pad(self) -> int:
        return (self.tokenizer.pad_token_id or 0) if self.tokenizer else 0

    @contextlib.contextmanager
    def using(self, trees: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor] | None = None,
              stacked: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Run forwards with these lanes' trainables (`stacked`: already stacked, one leading K), wherever they lie."""
        if base and not self.space.takes_base:
            raise CompositionError(f"space '{self.space.stem}' cannot add a drift to the base; use 'lora'")
        s = self.stack
        before = (s.k, s.tensors, s.base, s.extra, s.mask, s.past)
        stacked = stack_lanes(trees) if stacked is None else stacked
        s.k, s.tensors, s.extra = len(trees), tree_to(stacked, self.device), {}
        s.base = tree_to(base or {}, self.device)
        self.space.prepare(s, trees)
        if len(trees) > 1 and not self.stackable:
            raise ModelError(f"{self.name or type(self.net).__name__} takes the trainables of one client at a time")
        weights = None if self.ways.sites or not s.tensors else put_in(
            self.space, self.bare, {n: t[0] for n, t in s.tensors.items()})
        try:
            with swapped(self.net, weights or {}):
                yield
        finally:
            s.k, s.tensors, s.base, s.extra, s.mask, s.past = before

    def losses(self, batch: Batch) -> Tensor:
        """Mean loss of each lane [K]: over its supervised tokens, or over its labelled rows."""
        total, count, _ = self.row_losses(batch)
        lanes = total.view(batch.k, -1).sum(1), count.view(batch.k, -1).sum(1)
        return lanes[0] / lanes[1].clamp(min=1)

    def row_losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """For each row [N]: summed loss, how many targets it sums over, how many of them were predicted right."""
        self.stack.rows = batch.ids.shape[0]
        with fast(batch.ids.device, batch.ids.shape[1], self.fast_kernels):
            return self.loss(self, batch) if self.loss else self.rules.row_losses(self, batch)

    def figures(self, batch: Batch) -> Tensor:
        """For each row what the task's metrics sum up [N, 3 or more], fp64: the row losses come first."""
        self.stack.rows = batch.ids.shape[0]
        with fast(batch.ids.device, batch.ids.shape[1], self.fast_kernels):
            if self.loss:
                return torch.stack([x.double() for x in self.loss(self, batch)], 1)
            return self.rules.figures(self, batch)

    def measured(self, figures: np.ndarray) -> dict[str, float]:
        """The task's metrics; none of those that need figures which a loss of the net's own does not give."""
        own = self.loss is None or type(self.rules).figures is Task.figures
        return self.rules.measured(figures, self.labels) if own else {}

    def word_losses(self, h: Tensor, rows: Tensor, cols: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy [M] of the words `y` [M] through the head at h[rows, cols]."""
        return word_losses(self, h, rows, cols, y)

    def word_logits(self, batch: Batch) -> Tensor:
        """[N, T, V] of a masked language model, through its head as it applies it."""
        if not self.ways.uneven and not bool(batch.mask.all()):
            return by_length(batch, self.word_logits)
        self.stack.rows, self.stack.mask = batch.ids.shape[0], batch.mask
        return self.net(input_ids=batch.ids, attention_mask=batch.mask.long()).logits

    def target_logits(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of every target, row by row: whose it is [M], the logits that predict it [M, V or C], and itself [M]."""
        return target_logits(self, batch)

    def class_logits(self, batch: Batch) -> Tensor:
        """[N, classes], or [N, T, classes] where every token has a class; in fp32 or better."""
        self.stack.rows = batch.ids.shape[0]
        if isinstance(self.net, DualEncoder):
            own = self.space.classes(self.net, self.stack, batch)
            return wide(self.net.logits(self.stack, batch) if own is None else own)
        if isinstance(self.net, ShopNet | PairNet):
            return wide(self.net.logits(self.stack, batch))
        return wide(self.net.classifier(self.pooled(batch)))

    def pooled(self, batch: Batch) -> Tensor:
        """One state of each row [N, d] ([N, T, d] where every token has a class); those that came with the rows stay,
        unless the base has drifted or something is drawn below them."""
        state = batch.parts.get(part_of(self))
        if state is not None and not self.stack.base and self.stack.noise is None:
            self.stack.rows = batch.ids.shape[0]
            return state.to(self.net.dtype)
        return self.net.pool(self.hidden(batch), batch.mask)

    @functools.cached_property
    def settled(self) -> bool:
        """Whether texts get their states when they are read, since no trainable lies below the classifier."""
        return isinstance(self.net, HeadedEncoder) and is_settled(self)

    @functools.cached_property
    def seen_once(self) -> bool:
        """Whether pictures become features when they are read, since no trainable lies in what makes them."""
        return isinstance(self.net, DualEncoder) and self.net.cached and not inside(VISION, self.initial())

    @property
    def resting(self) -> tuple[str, ...]:
        """Modules that no row passes through in a step: their work is done once, or for the classes alone."""
        return (*TEXT, *(VISION if self.seen_once else ())) if isinstance(self.net, DualEncoder) else ()

    def read(self, rows: Sequence[Encoded]) -> list[Encoded]:
        """Rows as steps take them: pictures of a frozen tower become `features` here, texts under a classifier that
        alone is trained get their `state`, once; other pictures count their tower's tokens."""
        if not isinstance(self.net, DualEncoder):
            return with_states(self, rows) if self.settled else list(rows)
        return with_features(self, rows)

    def outputs(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """Class logits [N, classes] of texts that are given as embeddings [N, T, d], padded on the right."""
        if not isinstance(self.net, HeadedEncoder) or self.net.pooling == "each":
            raise ModelError("class logits of embeddings need a classification model (data.task = 'classification')")
        if not self.ways.uneven and not bool(mask.all()):
            return torch.cat([self.outputs(x[None, m], m[None, m]) for x, m in zip(embeds, mask.bool(), strict=True)])
        self.stack.rows = len(embeds)
        h = self.net.body(inputs_embeds=embeds.to(self.net.dtype), attention_mask=mask.long()).last_hidden_state
        return wide(self.net.classifier(self.net.pool(h, mask)))

    def hidden(self, batch: Batch, padded: bool = True) -> Tensor:
        """Last hidden states of the text positions [N, T, d]; virtual tokens in front are cut off again. Who looks at
        no padding says `padded=False`: where that saves work it is left out then."""
        return hidden(self, batch, padded)

    def logits_of(self, h: Tensor) -> Tensor:
        """Hidden states [..., d] -> vocabulary logits, as the model makes them: caps, scales and all."""
        if self.head is None:
            raise ModelError(f"{self.name or type(self.net).__name__} is no language model and has no logits of words")
        return self.head(h)
