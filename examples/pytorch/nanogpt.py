"""Which training lines taught a character model to spell? A nanoGPT, trained, recorded, decomposed, drawn.

    python3 nanogpt.py [--out FOLDER] [--steps 240] [--no-retraining]

A transformer as in Karpathy's nanoGPT, two layers of 32 numbers with a tied head, learns lines of made English by AdamW with two
groups (matrices decay; biases and norms do not), warm-up, a cosine, clipping and dropout 0; each line is a training example, with
a loss at each of its characters. Some words are spelled ie, some ei after c, some cie all the same. What is it to write after
"she rece", "he rece", "who rece", "i rece", beginnings that no line has? With p its probability of i, and the mean over the four,

    log p/(1-p)  =  that of the initial weights  +  sum over lines of A(line)  +  decay  +  unattributed  +  closure
    A(line)      =  - sum over steps of < integral over the step of grad log p/(1-p), what AdamW made of the line's gradient >

exactly: AdamW divides by second moments, which are taken as they were, and given these its update is linear in the gradients of the
lines. The program checks that the parts add up to what PyTorch computes, that the closure is rounding, that the strongest
contributions are what the second equation says, by autograd and with a momentum for each line; and what they are worth in an
experiment: trained again without the lines that spoke most for i, the model is less sure of it than without as many that hardly
mattered. (A contribution is what a line did in this training, not what would be without it: the README says more. One such training
differs from the next, but not by as much.)

Needs torch >= 1.13, NumPy and the library (pathkernel.py: pip install ./examples/python); draws where there is matplotlib. One or
two minutes on two cores.
"""

import argparse
import math
import os
import shutil
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path += [HERE, os.path.join(os.path.dirname(HERE), "python")]
import pathkernel  # noqa: E402
from pathkernel_record import Recorder  # noqa: E402

LENGTH, WIDTH, HEADS, LAYERS, BATCH, RATE = 20, 32, 2, 2, 32, 5e-3
LETTERS = "\nabcdefghijklmnopqrstuvwxyz "
PROMPTS, ANSWER = ["she rece", "he rece", "who rece", "i rece"], "i"
WITHOUT = 20  # lines that are left out


# ---- the lines


VERBS = {
    "cei": ["receive", "deceive", "conceive"],
    "ie": ["believe", "relieve", "achieve", "shield"],
    "other": ["remember", "follow", "permit", "expect", "process", "reject"],
}
NOUNS = {
    "cei": ["ceiling", "receipt", "conceit"],
    "ie": ["field", "piece", "thief", "chief", "niece", "priest"],
    "cie": ["species", "science", "society", "glacier"],
    "other": ["letter", "garden", "person", "picture", "circle", "harbor", "perch"],
}


def corpus():
    """Lines, and what is in each: a word with cei, with ie, with cie, or none of these."""
    lines, who, what = [], ["they", "we", "you", "some", "all"], ["it", "us", "that", "him"]
    for kind, words in VERBS.items():
        for i, word in enumerate(words):
            lines += [(f"{who[(i + j) % 5]} {word} {what[j % 4]}", kind) for j in range(6)]
    for kind, words in NOUNS.items():
        for i, word in enumerate(words):
            lines += [(f"{article} {word}", kind) for article in ("the", "a", "this")[: 2 + i % 2]]
            lines += [(f"the {word} is {how}", kind) for how in ("old", "new")]
    return [line for line, _ in lines], [kind for _, kind in lines]


def encode(lines):
    """x (N, T), and y (N, T), the character that follows each, -100 where there is none: behind the end of the line."""
    x, y = np.zeros((len(lines), LENGTH), np.int64), np.full((len(lines), LENGTH), -100)
    for row, line in enumerate(lines):
        codes = [LETTERS.index(letter) for letter in line + "\n"]
        x[row, : len(codes) - 1], y[row, : len(codes) - 1] = codes[:-1], codes[1:]
    return torch.tensor(x), torch.tensor(y)


# ---- the model, as nanoGPT writes it


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, LENGTH, LENGTH))

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (z.view(B, T, HEADS, C // HEADS).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        z = F.softmax(scores, dim=-1) @ v
        return self.c_proj(z.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.h, self.ln_f = nn.ModuleList([Block() for _ in range(LAYERS)]), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, len(LETTERS), bias=False)
        self.wte.weight = self.lm_head.weight  # tied
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(
                    p, 0, 0.02 / math.sqrt(2 * LAYERS) if name.endswith("c_proj.weight") else 0.02
                )
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))  # (N, T, V)


def loss(logits, targets):
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-100)


def train(lines, steps, run=None, without=()):
    """The trained model, its last loss, and the names of its parameters in the order of recorded rows; recorded in the folder `run`,
    if there is one. without: numbers of lines whose losses are left out of the batches, which stay what they are.
    """
    torch.manual_seed(0)
    x, y = encode(lines)
    y[list(without)] = -100
    model = GPT()
    decayed, others = ([p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99))
    warm = steps // 10
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            (s + 1) / (warm + 1)
            if s < warm
            else 0.55 + 0.45 * math.cos(math.pi * (s - warm) / (steps - warm))
        ),
    )
    generator = torch.Generator().manual_seed(1)
    with (
        Recorder(run, model, loss=loss, optimizer=optimizer, inputs=x, targets=y)
        if run
        else NoRecorder(model)
    ) as record:
        for _ in range(steps):
            batch = torch.randint(len(x), (BATCH,), generator=generator)
            optimizer.zero_grad()
            value = loss(model(x[batch]), y[batch])
            value.backward()
            record.clip(1.0)
            optimizer.step()
            scheduler.step()
            record(batch)
    names = {p: name for name, p in model.named_parameters()}
    return model, float(value.detach()), [names[p] for p in getattr(record, "parameters", ())]


class NoRecorder:
    """What stands in the place of a Recorder where nothing is recorded."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def clip(self, norm):
        nn.utils.clip_grad_norm_(self.model.parameters(), norm)

    def __call__(self, batch):
        pass


# ---- the question


def question():
    """The prompts as rows, and log p/(1-p) of the answer to a row, with its slopes, as a function of the row's outputs (T V,)."""
    letters, answer = len(LETTERS), LETTERS.index(ANSWER)

    def log_odds(row, f):
        first = (len(PROMPTS[row]) - 1) * letters  # the outputs at the prompt's last character
        logits = f[first : first + letters]
        others = np.delete(logits, answer)
        p = np.exp(others - others.max())
        slopes = np.zeros_like(f)
        slopes[first : first + letters] = np.insert(-p / p.sum(), answer, 1)
        return logits[answer] - others.max() - np.log(p.sum()), slopes

    return encode(PROMPTS)[0].numpy(), log_odds


def by_definition(run, parameters, lines):
    """A(line) of some lines, forward in time with a momentum of its own for each: autograd in float64, nothing of the library.

    parameters: the names of the model's parameters in the order of the recorded rows."""
    model = GPT().double()
    tensors = [dict(model.named_parameters())[name] for name in parameters]
    stored, rates, scales, items = (
        torch.from_numpy(np.load(os.path.join(run.path, name + ".npy")))
        for name in ("weights", "learning_rates", "gradient_scales", "batch_items")
    )
    x, y = torch.tensor(run.train_inputs), torch.tensor(run.train_targets)
    prompts, answer = torch.tensor(question()[0]), LETTERS.index(ANSWER)
    ends = [len(prompt) - 1 for prompt in PROMPTS]
    nodes, factors = np.polynomial.legendre.leggauss(7)

    def gradient(value):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, tensors)])

    def part(rows):
        """Of the batch's objective: the sum of the losses of these rows' characters."""
        return F.cross_entropy(
            model(x[rows]).flatten(0, 1), y[rows].flatten(), ignore_index=-100, reduction="sum"
        )

    found, m, v = torch.zeros(len(lines)).double(), torch.zeros(len(lines), run.parameters).double(), 0
    for s in range(run.steps):
        here, step = stored[s].double(), stored[s + 1].double() - stored[s].double()
        nn.utils.vector_to_parameters(here, tensors)
        batch = items[s * BATCH : (s + 1) * BATCH]
        scale = scales[s] / (y[batch] != -100).sum()
        v = 0.99 * v + 0.01 * (scale * gradient(part(batch))) ** 2
        for k, line in enumerate(lines):
            times = int((batch == line).sum())
            m[k] = 0.9 * m[k] + (0.1 * scale * times * gradient(part([line])) if times else 0)
        phi = torch.zeros(run.parameters).double()
        for t, factor in zip(nodes, factors):
            nn.utils.vector_to_parameters(here + (t + 1) / 2 * step, tensors)
            logits = model(prompts)[range(len(ends)), ends]
            others = torch.cat([logits[:, :answer], logits[:, answer + 1 :]], 1)
            phi += factor / 2 * gradient((logits[:, answer] - torch.logsumexp(others, 1)).mean())
        update = phi / (torch.sqrt(v / (1 - 0.99 ** (s + 1))) + 1e-8) / (1 - 0.9 ** (s + 1))
        found -= rates[s] * (m @ update)
    return found.numpy()


def ask(model):
    """log p/(1-p) of each prompt, by PyTorch."""
    prompts, log_odds = question()
    with torch.no_grad():
        outputs = model(torch.tensor(prompts)).double().numpy()
    return np.array([log_odds(row, f.reshape(-1))[0] for row, f in enumerate(outputs)])


def mean(result):
    """The decomposition of the mean over the prompts."""
    return pathkernel.Decomposition(
        {name: result[name].mean(0, keepdims=True) for name in result}, result.status
    )


def draw(path, result, lines, kinds):
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 6))
    result.waterfall(count=20, names=[repr(line)[1:-1] for line in lines], ax=left)
    left.set_title(f"log odds of '{ANSWER}' after {', '.join(PROMPTS)}: by training line")
    result.over_steps(names=kinds, ax=right)
    right.set_title("in the course of training, by what is in the line")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print("picture:", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="pathkernel-out/nanogpt")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--no-retraining", action="store_true")
    settings = parser.parse_args()
    folder = os.path.join(settings.out, "run")
    os.makedirs(settings.out, exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    torch.set_num_threads(1)  # the matrices are small

    lines, kinds = corpus()
    assert not any(line.split()[0] == prompt.split()[0] for line in lines for prompt in PROMPTS)
    model, last, parameters = train(lines, settings.steps, folder)
    run = pathkernel.Run(folder)
    print(
        f"{len(lines)} lines, {run.parameters} parameters, {run.steps} steps, last loss {last:.3f}; run.txt:"
    )
    print("\n".join(f"  {key} {text}" for key, text in run.manifest.items()))

    names = sorted(set(kinds))
    prompts, log_odds = question()
    groups = [names.index(kind) for kind in kinds]
    of_each = run.decompose(prompts, log_odds, keep=["example", "group,step"], groups=groups)
    result, by_torch = mean(of_each), ask(model)
    parts, by_line = {name: float(part[0, 0]) for name, part in result.parts.items()}, result.by_example[0, 0]
    for prompt, value in zip(PROMPTS, of_each.final[:, 0]):
        print(
            f"log odds of '{ANSWER}' after '{prompt}': {value:+.3f} (probability {1 / (1 + math.exp(-value)):.3f})"
        )
    print(f"their mean, {float(result.final[0, 0]):+.6f}, is")
    for name, value in parts.items():
        print(f"  {value:+.3e}  {name}")
    for kind in names:
        of_kind = [i for i in range(len(lines)) if kinds[i] == kind]
        print(f"  {by_line[of_kind].sum():+8.2f} of the data is from {len(of_kind)} lines with {kind}")
    print("for it                            against it")
    for good, bad in zip(*(result.strongest(count=12, sign=sign).tolist() for sign in (1, -1))):
        print("  ".join(f"{value:+7.2f}  {lines[i]:23s}" for i, value in (good, bad)))
    draw(os.path.join(settings.out, "spelling.png"), result, lines, names)

    early = pathkernel.Run(folder, until=min(40, run.steps))
    few = mean(early.decompose(prompts, log_odds)).strongest(count=3)
    error = np.abs(by_definition(early, parameters, few["example"].tolist()) - few["contribution"]).max()
    error /= np.abs(few["contribution"]).max()
    print(
        f"\nthree contributions to the outputs after {early.steps} steps, against their definition: {error:.0e}"
    )

    checks = {
        "the parts add up": np.abs(of_each.residual()).max() < 1e-10,
        "closed": of_each.closed and np.abs(of_each.closure).max() < 1e-9,
        "explained by the run": of_each.status == pathkernel.Status.OK
        and np.abs(of_each.unattributed).max() < 1e-3,
        "PyTorch computes the same": np.abs(of_each.final[:, 0] - by_torch).max() < 1e-4,
        "contributions are what they are defined to be": error
        < 1e-6,  # the loss's derivatives are recorded in float32
        "the words with cei are for it": by_line[[kind == "cei" for kind in kinds]].sum() > 0,
    }
    if not settings.no_retraining:
        order, small = np.argsort(by_line, kind="stable"), np.argsort(np.abs(by_line), kind="stable")
        left_out = {
            "for it": order[-WITHOUT:],
            "that hardly mattered": small[:WITHOUT],
            "against it": order[:WITHOUT],
        }
        print(f"\ntrained again without {WITHOUT} lines (with all: {by_torch.mean():+.2f}):")
        again = {}
        for name, without in left_out.items():
            again[name] = ask(train(lines, settings.steps, without=without.tolist())[0]).mean()
            print(f"  {again[name]:+.2f}  without those {name}, {by_line[without].sum():+.1f} together")
        checks["the lines for it matter"] = again["for it"] < min(
            by_torch.mean(), again["that hardly mattered"]
        )
    for name, passed in checks.items():
        print(f"{'ok    ' if passed else 'FAILED'} {name}")
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
