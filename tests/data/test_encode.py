"""Tokens carry the right targets, truncation keeps what is learned, and batches pad little across clients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedllm.core.errors import CompositionError, DataError, RecipeError
from fedllm.data.encode import BUCKET, batches, encode_row, encode_rows

WORDS = ["[UNK]", "<s>", "</s>", "[CLS]", "[SEP]", *"abcdefgh:", "user", "assistant"]
ID = {word: i for i, word in enumerate(WORDS)}
CHAT = ("{% for m in messages %}{{ m.role + ' : ' + m.content + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}")


def make_tokenizer(**special):
    tokenizer = Tokenizer(models.WordLevel(ID, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ID["[CLS]"]), ("[SEP]", ID["[SEP]"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(bos_token="<s>", eos_token="</s>")


def ids(text):
    return [ID[word] for word in text.split()]


def check(encoded, text, targets):
    """`targets` marks each token that is learned by 1."""
    assert encoded.ids.dtype == np.int32
    assert encoded.labels.dtype == np.int64
    assert encoded.ids.tolist() == ids(text)
    assert encoded.labels.tolist() == [i if on == "1" else -100 for i, on in zip(ids(text), targets, strict=True)]
    assert encoded.n_target == targets.count("1")


ROW = {"prompt": "a b c", "response": "d e"}


@pytest.mark.parametrize("max_length, text, targets", [
    (99, "<s> a b c d e </s>", "0000111"),
    (7, "<s> a b c d e </s>", "0000111"),
    (6, "<s> b c d e </s>", "000111"),
    (5, "<s> b c d e", "00011"),
    (4, "<s> c d e", "0011"),
    (3, "<s> c d", "001"),
    (2, "<s> d", "01"),
])
def test_truncation_takes_the_responses_end_down_to_half_the_room_and_then_the_prompts_start(
        tokenizer, max_length, text, targets):
    encoded = encode_row(ROW, tokenizer, "generation", max_length)
    check(encoded, text, targets)
    assert encoded.prompt.tolist() == encoded.ids[: targets.index("1")].tolist()


def test_all_tokens_but_the_first_are_learned_without_completion_only(tokenizer):
    check(encode_row(ROW, tokenizer, "generation", 99, completion_only=False), "<s> a b c d e </s>", "0111111")


def test_a_tokenizer_without_bos_and_eos_adds_none():
    bare = make_tokenizer()
    check(encode_row(ROW, bare, "generation", 99), "a b c d e", "00011")
    check(encode_row({"prompt": "", "response": "a b c"}, bare, "generation", 99), "a b c", "011")
    with pytest.raises(DataError, match="row 2 has nothing to learn: its response 'a'"):
        encode_rows([ROW, {"prompt": "", "response": "a"}], bare, "generation", 99)


def test_classification_takes_the_tokenizers_own_special_tokens(tokenizer):
    encoded = encode_row({"text": "a b c d", "label": 3}, tokenizer, "classification", 5)
    assert (encoded.ids.tolist(), encoded.labels, encoded.n_target) == (ids("[CLS] a b c [SEP]"), 3, 1)
    assert encoded.prompt is encoded.ids


def test_chat_rows_are_rendered_by_the_tokenizers_template():
    tokenizer = make_tokenizer(bos_token="<s>", eos_token="</s>", chat_template=CHAT)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"},
             {"role": "assistant", "content": "d e"}]
    row = {"messages": turns, "prompt": "c", "response": "d e"}
    check(encode_row(row, tokenizer, "generation", 99),
          "user : a </s> assistant : b </s> user : c </s> assistant : d e </s>", "0" * 6 + "11" + "0" * 6 + "111")
    (last,) = encode_rows([row], tokenizer, "generation", 99, every_turn=False)
    check(last, "user : a </s> assistant : b </s> user : c </s> assistant : d e </s>", "0" * 14 + "111")
    with pytest.raises(CompositionError, match="'chat' and the tokenizer"):
        encode_row(row, make_tokenizer(), "generation", 99)


def test_many_rows_are_the_same_as_one_by_one(tokenizer):
    rows = [{"prompt": " ".join("abcdefgh"[: i % 8]), "response": "a b c"[: 1 + 2 * (i % 3)]} for i in range(50)]
    for one, row in zip(encode_rows(rows, tokenizer, "generation", 8), rows, strict=True):
        again = encode_row(row, tokenizer, "generation", 8)
        assert one.ids.tolist() == again.ids.tolist()
        assert one.labels.tolist() == again.labels.tolist()
    assert encode_rows([], tokenizer, "generation", 8) == []
    with pytest.raises(RecipeError, match="max_length = 1: allowed"):
        encode_rows(rows, tokenizer, "generation", 1)


def deal(lengths, batch_size, seed=0, **amount):
    own, shared = np.random.default_rng([seed, len(lengths)]), np.random.default_rng(seed)
    return batches(lengths, batch_size, own, shared, **amount)


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 900), batch_size=st.integers(1, 12), seed=st.integers(0, 1000), epochs=st.integers(1, 3))
def test_each_epoch_visits_each_row_once(n, batch_size, seed, epochs):
    lengths = np.random.default_rng(seed).integers(1, 50, n)
    got = deal(lengths, batch_size, seed, epochs=epochs)
    per_epoch = -(-n // batch_size)
    assert len(got) == epochs * per_epoch
    for e in range(epochs):
        epoch = got[e * per_epoch : (e + 1) * per_epoch]
        assert sorted(np.concatenate(epoch)) == list(range(n))
        assert sorted(map(len, epoch))[1:] == [batch_size] * (per_epoch - 1)
    longer = deal(lengths, batch_size, seed, steps=len(got) + 3)
    assert len(longer) == len(got) + 3


def test_batches_are_a_pure_function_and_epochs_differ():
    lengths = np.random.default_rng(0).integers(1, 50, 100)
    first, second = deal(lengths, 8, steps=30), deal(list(lengths), 8, steps=30)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    # The same rows need not meet again: compare the batches of two epochs as sets.
    one, two = ({frozenset(b.tolist()) for b in first[k : k + 13]} for k in (0, 13))
    assert one != two


def test_fewer_rows_than_a_batch_give_smaller_batches():
    assert [sorted(b.tolist()) for b in deal([5, 3, 9], 8, steps=2)] == [[0, 1, 2]] * 2


def test_batch_lengths_go_up_and_down():
    lengths = np.random.default_rng(0).integers(1, 500, 400)
    means = np.array([lengths[b].mean() for b in deal(lengths, 8, epochs=1)])
    rising = (np.diff(means) > 0).mean()
    assert 0.2 < rising < 0.8
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


@pytest.mark.parametrize("rows", [400, 3000])
def test_clients_side_by_side_pad_little(rows):
    steps = 50
    waste, plain = [], []
    for seed in range(3):
        lengths = [np.random.default_rng([seed, k]).lognormal(4, 0.4, rows).astype(int) + 1 for k in range(8)]
        dealt = [batches(of, 8, np.random.default_rng([seed, k]), np.random.default_rng(seed), steps=steps)
                 for k, of in enumerate(lengths)]
        shuffled = [np.random.default_rng(k).permutation(rows)[: steps * 8].reshape(steps, 8) for k in range(8)]
        for out, order in ((waste, dealt), (plain, shuffled)):
            step = [np.concatenate([of[one[t]] for of, one in zip(lengths, order, strict=True)]) for t in range(steps)]
            out.append(sum(s.max() * len(s) for s in step) / sum(s.sum() for s in step))
    assert rows == 400 or rows > 8 * BUCKET
    assert np.mean(waste) <= 1.15
    assert np.mean(plain) > 2


@pytest.mark.parametrize("size, amount", [(0, {"steps": 1}), (4, {}), (4, {"steps": 1, "epochs": 1}),
                                          (4, {"steps": 0})])
def test_wrong_amounts_are_refused(size, amount):
    with pytest.raises(RecipeError, match="allowed is"):
        deal([1, 2, 3], size, **amount)
    with pytest.raises(DataError, match="no rows"):
        deal([], 4, steps=1)
