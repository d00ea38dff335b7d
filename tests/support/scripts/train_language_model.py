"""Train a small GPT-2 on the language reference that ships with Python."""

from dataclasses import dataclass, field
from pydoc_data.topics import topics

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)


@dataclass
class ModelArguments:
    hidden_size: int = field(default=32, metadata={"help": "Width of the model."})
    num_layers: int = field(default=2, metadata={"help": "Number of transformer blocks."})
    num_heads: int = field(default=2, metadata={"help": "Attention heads per block."})
    dropout: float = field(default=0.1, metadata={"help": "Dropout everywhere in the model."})


@dataclass
class DataArguments:
    vocab_size: int = field(default=400, metadata={"help": "Size of the BPE vocabulary."})
    block_size: int = field(default=32, metadata={"help": "Tokens per training example."})
    max_characters: int = field(default=100_000, metadata={"help": "How much text to use."})


class TextBlocks(torch.utils.data.Dataset):
    """Consecutive blocks of one long token sequence."""

    def __init__(self, ids: list[int], block_size: int):
        whole = len(ids) // block_size * block_size
        self.blocks = torch.tensor(ids[:whole]).view(-1, block_size)

    def __len__(self):
        return len(self.blocks)

    def __getitem__(self, index):
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main():
    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)

    text = "\n\n".join(topics[name] for name in sorted(topics))[: data_args.max_characters]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        text.splitlines(), vocab_size=data_args.vocab_size, special_tokens=["<|endoftext|>"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")

    ids = bpe.encode(text).ids
    split = int(0.9 * len(ids))
    train_dataset = TextBlocks(ids[:split], data_args.block_size)
    eval_dataset = TextBlocks(ids[split:], data_args.block_size)

    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=data_args.block_size,
        n_embd=model_args.hidden_size,
        n_layer=model_args.num_layers,
        n_head=model_args.num_heads,
        resid_pdrop=model_args.dropout,
        embd_pdrop=model_args.dropout,
        attn_pdrop=model_args.dropout,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
