"""Small sets of questions in VQAv2's files."""

import json
from pathlib import Path

from PIL import Image

TEN = ("red",) * 6 + ("dark red",) * 4


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), "green").save(path)
    return path


def ask(question_id, image_id, text="What colour is it?"):
    return {"image_id": image_id, "question": text, "question_id": question_id}


def annotate(question_id, image_id, answers=TEN, main=None, *, kind="other", begins="what"):
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(answers, start=1)
    ]
    return {
        "question_type": begins,
        "multiple_choice_answer": main if main is not None else (answers or [""])[0],
        "answers": people,
        "image_id": image_id,
        "answer_type": kind,
        "question_id": question_id,
    }


def write_questions(path, questions):
    content = {"info": {"year": 2017}, "license": {"name": "CC"}, "questions": questions}
    return write(path, content)


def write_annotations(path, annotations):
    return write(path, {"info": {"year": 2017}, "annotations": annotations})


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def vqav2_part(folder, part, image_ids, *, each=2, annotated=True, year=None):
    """Write a part as VQAv2 publishes it, with `each` questions about each image."""
    year = year or f"{part}2014"
    ids = [(image * 1000 + number, image) for image in image_ids for number in range(each)]
    name = f"v2_OpenEnded_mscoco_{year}_questions.json"
    write_questions(folder / name, [ask(*pair, f"Is this {pair[0]}?") for pair in ids])
    if annotated:
        name = f"v2_mscoco_{year}_annotations.json"
        write_annotations(folder / name, [annotate(*pair) for pair in ids])
    place = year.replace("-dev", "")
    for image in image_ids:
        picture(folder / place / f"COCO_{place}_{image:012d}.jpg")


def own_part(folder: Path, questions, annotations=None, *, images=(1, 2), part="val"):
    """Write a part of a folder of one's own, with images in one folder."""
    write_questions(folder / f"{part}_questions.json", questions)
    if annotations is not None:
        write_annotations(folder / f"{part}_annotations.json", annotations)
    for image in images:
        picture(folder / "images" / f"{image}.png")
    return folder
