"""OpenFedLLM's training loop, line for line in what it does, on the current trl.

Source: github.com/rui-ye/OpenFedLLM, main_sft.py and federated_learning/fed_global.py. For each client of a round it
sets the adapter's state, takes this round's subset of the rows, makes new training arguments and a new SFTTrainer
(which tokenizes the subset), trains, and deep-copies the adapter's state; the server sums dictionaries. One thing is
kinder than the original: gradient checkpointing, its default, is off.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
import warnings
from typing import Any

import datasets
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

warnings.filterwarnings("ignore")
logging.getLogger("transformers").setLevel(logging.ERROR)
datasets.disable_progress_bars()


class OpenFedLLM:
    """FedAvg over clients whose texts are given by client id."""

    def __init__(self, net: Any, peft_config: Any, tokenizer: Any, texts: dict[str, list[str]], *, steps: int,
                 batch_size: int, max_length: int, lr: float) -> None:
        self.tokenizer, self.steps, self.batch_size, self.max_length = tokenizer, steps, batch_size, max_length
        self.lr, self.rounds_done = lr, 0
        self.model = get_peft_model(net, peft_config)
        self.local_datasets = {c: datasets.Dataset.from_dict({"text": rows}) for c, rows in texts.items()}
        self.global_dict = copy.deepcopy(get_peft_model_state_dict(self.model))
        self.folder = tempfile.mkdtemp(prefix="openfedllm-")

    def round(self) -> int:
        """One round over all clients; returns the tokens trained on."""
        local_dicts, sizes, tokens = {}, {}, 0
        lr = _cosine_learning_rate(self.rounds_done, 200, self.lr)
        for client, rows in self.local_datasets.items():
            set_peft_model_state_dict(self.model, self.global_dict)
            subset = rows.select(range(self.steps * self.batch_size))  # get_dataset_this_round draws this many
            trainer = SFTTrainer(model=self.model, args=self._arguments(lr), train_dataset=subset,
                                 processing_class=self.tokenizer)
            trainer.remove_callback(PrinterCallback)
            trainer.train()
            tokens += int(trainer.state.num_input_tokens_seen)
            local_dicts[client] = copy.deepcopy(get_peft_model_state_dict(self.model))
            sizes[client] = len(rows)
        total = sum(sizes.values())
        for key in self.global_dict:
            self.global_dict[key] = sum([local_dicts[c][key] * sizes[c] / total for c in local_dicts])
        set_peft_model_state_dict(self.model, self.global_dict)
        self.rounds_done += 1
        return tokens

    def _arguments(self, lr: float) -> SFTConfig:
        return SFTConfig(
            output_dir=self.folder, per_device_train_batch_size=self.batch_size, gradient_accumulation_steps=1,
            learning_rate=lr, max_steps=self.steps, lr_scheduler_type="constant", logging_steps=100, save_strategy="no",
            report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=self.max_length,
            dataset_text_field="text", disable_tqdm=True, dataloader_pin_memory=False,
            include_num_input_tokens_seen="all")


def _cosine_learning_rate(round: int, rounds: int, first: float, last: float = 1e-6) -> float:
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * round / rounds))
