"""A trained model behind HTTP: vectors, similarities, captions and classes of pictures and texts.

    python -m pretrain.serve runs/base/retrieval --port 8000
    (printf '{"texts": ["a red bus", "two dogs"], "pictures": ["'; base64 -w0 a.jpg; printf '"]}') |
        curl -s localhost:8000/similarity -H 'Content-Type: application/json' --data @-

POST /embed, /similarity, /caption and /predict take JSON with `pictures` (base64 of JPEG, PNG or WebP files), `texts`,
or `names` of classes; a fine-tuned stage has classes of its own, which --labels names. GET /health says what can be
asked of the weights, /metrics is Prometheus's, /openapi.json has the bodies. Requests that come together go through the
model together and get the answers that they would get alone. Everything a client may send is bounded (LIMITS). A
refused request is answered with {"error": one sentence} and a status: 400 and 413 to 415 for what the client sent, 501
for what these weights cannot do, 503 with Retry-After when the server is full, 408 and 504 when time is up. After
SIGTERM or Ctrl-C the server answers the requests that it is working on, then ends.

There is no password and no TLS: put it behind a proxy that has them. launch/serve/ has an image and Kubernetes files.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch

from pretrain.command import make_parser, run
from pretrain.evals.zero_shot import TEMPLATES, check_templates, read_names
from pretrain.models.generation import Writing
from pretrain.pretrained import load
from pretrain.serving.counts import Counts
from pretrain.serving.limits import Limits
from pretrain.serving.service import PATHS, Service
from pretrain.visible import say, start_logging

PORT = 8000

# What each field of serving.limits.Limits bounds: the help of its option.
LIMITS = {
    "body": "bytes of a request's body",
    "bodies": "bytes of all bodies that are held at a time",
    "pixels": "pixels of a picture",
    "pictures": "pictures of a request",
    "texts": "texts of a request; names count once for each --template",
    "characters": "characters of a text",
    "queue": "pictures and texts of all requests that are being worked on",
    "connections": "connections at a time",
    "seconds": "from a request's head to its answer",
    "body_seconds": "from a request's head to the end of its body",
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.serve", __doc__, "runs/quickstart/retrieval --port 8000")
    parser.add_argument("weights", type=Path, help="whatever pretrain.load reads, such as a stage's directory")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; 0.0.0.0 is everywhere (%(default)s)")
    parser.add_argument("--port", type=int, default=PORT, help="0 takes a free one (%(default)s)")
    parser.add_argument("--text-tokenizer", type=Path, help="for weights that came without theirs")
    parser.add_argument("--labels", metavar="FILE", help="JSON list of the classes' names by number, for /predict")
    parser.add_argument("--template", action="append", metavar="TEXT", help=f"around a name ({TEMPLATES[0]!r})")
    parser.add_argument("--device", help="such as cuda:1 (a GPU where there is one)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: a batch then changes last digits")
    parser.add_argument("--batch", type=int, default=64, help="pictures or texts of one pass (%(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode (%(default)s)")
    parser.add_argument("--beams", type=int, default=Writing.beams, help="of a caption (%(default)s)")
    parser.add_argument("--max-words", type=int, default=Writing.max_words, help="ids of a caption (%(default)s)")
    group = parser.add_argument_group("limits")
    for field in fields(Limits):
        kind = float if isinstance(field.default, float) else int
        flag, about = f"--{field.name.replace('_', '-')}", f"{LIMITS[field.name]} (%(default)s)"
        group.add_argument(flag, type=kind, default=field.default, metavar="N", help=about)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="requests that were at work have been answered")


def _run(args: argparse.Namespace) -> None:
    limits = Limits(**{field.name: getattr(args, field.name) for field in fields(Limits)})
    if args.batch < 1 or args.workers < 1:
        raise ValueError(f"--batch {args.batch} and --workers {args.workers} must be 1 or more")
    writing = Writing(args.beams, max_words=args.max_words)
    templates = args.template or TEMPLATES
    check_templates(templates)
    labels = read_names(args.labels) if args.labels is not None else None
    try:
        from pretrain.serving.app import make_app
        from pretrain.serving.connections import bind, serve
    except ImportError as error:
        raise ValueError(f"serving needs fastapi and uvicorn ({error}); pip install 'imglish[serve]'") from None
    start_logging()
    listener = bind(args.host, args.port)  # first: a port that is taken should not cost the time of loading
    with listener:
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        model = load(args.weights, text_tokenizer=args.text_tokenizer, device=_device(args.device), dtype=dtype)
        service = Service(
            model,
            limits,
            Counts(),
            labels=labels,
            templates=templates,
            writing=writing,
            batch=args.batch,
            workers=args.workers,
        )
        host, port = listener.getsockname()[:2]
        can = ", ".join(path for path in PATHS if path not in service.lacks)
        serve(make_app(service), listener, limits, started=lambda: say(f"http://{host}:{port} answers {can}"))
    say("all requests are answered")


def _device(name: str | None) -> str | None:
    """`name` itself. ValueError where torch cannot put a tensor on that device."""
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # torch has no class of its own for a device that is missing
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); leave it out, or use cpu or cuda:0") from None
    return name


if __name__ == "__main__":
    sys.exit(main())
