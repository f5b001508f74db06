"""Small files in the real layouts of sets of videos; nothing in them is decoded."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

KINETICS = "label,youtube_id,time_start,time_end,split,is_cc"


def files(folder: Path, names: Iterable[str]) -> None:
    """Write files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def lines(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def msr_vtt(
    folder: Path, captions: Mapping[str, Sequence[str]], tested: Mapping[str, str], **tables: str
) -> None:
    """Write MSR-VTT's JSON, the table of 1k-A, and tables of ids such as `train_9k="video1"`."""
    content = {
        "info": {"year": "2016"},
        "videos": [{"video_id": video, "category": 9, "url": "..."} for video in captions],
        "sentences": [
            {"caption": text, "video_id": video, "sen_id": number}
            for video, texts in captions.items()
            for number, text in enumerate(texts)
        ],
    }
    lines(folder / "MSRVTT_data.json", json.dumps(content))
    rows = [
        f'ret{number},msr{video},{video},"{text}"'
        for number, (video, text) in enumerate(tested.items())
    ]
    lines(folder / "MSRVTT_JSFUSION_test.csv", "key,vid_key,video_id,sentence", *rows)
    for name, ids in tables.items():
        lines(folder / f"MSRVTT_{name.replace('_', '.')}.csv", "video_id", *ids.split())
