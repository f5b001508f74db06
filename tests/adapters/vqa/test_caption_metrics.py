"""Words against those of the Java program that COCO's tools call, and metrics against theirs."""

import sys

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from adapters.vqa.caption_metrics import caption_metrics, words
from unicl.errors import UsageError

# What pycocoevalcap.tokenizer.ptbtokenizer makes of them, by Stanford's tokenizer 3.4.1.
BY_JAVA = {
    "A man riding a wave on top of a surfboard.": "a man riding a wave on top of a surfboard",
    "A red bus is parked next to the man's bike.": "a red bus is parked next to the man 's bike",
    "It's a dog that isn't on a leash.": "it 's a dog that is n't on a leash",
    "Two dogs can't get the frisbee they've lost.": "two dogs ca n't get the frisbee they 've lost",
    "The kids' toys are on the floor.": "the kids toys are on the floor",
    "A T-shirt with a 4-year-old's drawing on it.": "a t-shirt with a 4-year-old 's drawing on it",
    "A woman (in a blue dress) holds a baby.": "a woman -lrb- in a blue dress -rrb- holds a baby",
    'A sign that says "No Parking" on a street.': "a sign that says no parking on a street",
    "A sign reads 'STOP' in red letters.": "a sign reads stop in red letters",
    "There are 1,000 people and 3.5 cakes.": "there are 1,000 people and 3.5 cakes",
    "The clock says 4:30 at 1/2 of the tower.": "the clock says 4:30 at 1/2 of the tower",
    "A U.S. flag waves over St. Mary's church.": "a u.s. flag waves over st. mary 's church",
    "Rock 'n' roll band plays at 5 o'clock.": "rock 'n' roll band plays at 5 o'clock",
    "Salt & pepper, and/or ketchup; on a table...": "salt & pepper and/or ketchup on a table",
    "He cannot see what's gonna happen!": "he can not see what 's gon na happen",
    "Is this a cat? Yes - it is -- a big one.": "is this a cat yes it is a big one",
    "Pizza [with cheese] and {olives}.": "pizza -lsb- with cheese -rsb- and -lcb- olives -rcb-",
    "A boy, about 10 years old, wearing #23.": "a boy about 10 years old wearing # 23",
    "A black-and-white photo of a well-lit room.": "a black-and-white photo of a well-lit room",
    "The cat\u2019s eyes aren\u2019t open.": "the cat 's eyes are n't open",
    "Price is $5.99 or 50% off @ the store.": "price is $ 5.99 or 50 % off @ the store",
    "A caf\u00e9 with cr\u00e8me for two.": "a caf\u00e9 with cr\u00e8me for two",
    "Mr. Smith and Dr. Jones don't wear ties.": "mr. smith and dr. jones do n't wear ties",
    "They'd say we're home; I'll wait, I'm sure.": "they 'd say we 're home i 'll wait i 'm sure",
    "A train with the number 66,020 on its side.": "a train with the number 66,020 on its side",
    "a bunch of bananas   hanging from a tree": "a bunch of bananas hanging from a tree",
    'The "tall" giraffe\'s 2-3 feet long.': "the tall giraffe 's 2-3 feet long",
    "gimme that, lemme see: you gotta go": "gim me that lem me see you got ta go",
    "A plane (B-52) at 7 a.m. on a runway .": "a plane -lrb- b-52 -rrb- at 7 a.m. on a runway",
    "A man's hand holding an iPhone4, a wii-mote": "a man 's hand holding an iphone4 a wii-mote",
    "Woman in 1950's dress talks on a cell-phone.": "woman in 1950 's dress talks on a cell-phone",
    "A bear's face / head close up": "a bear 's face / head close up",
    "a man with his dog,sitting on grass": "a man with his dog sitting on grass",
    "a 12\" pizza and a girl in 80's clothing": "a 12 pizza and a girl in 80 's clothing",
}

GUESSES = {7: "A man's dog runs on a beach.", 9: "a red bus, parked", 12: "three cats sleep"}
REFERENCES = {
    7: ("The man's dog is running on a sandy beach.", "A dog runs along the beach."),
    9: ("A red bus is parked (on a street).", "Bus, parked next to a curb"),
    12: ("Two cats sleep on a bed", "cats can't sleep", "Three cats sleep."),
    15: ("Nobody said anything of this one.",),
}


@pytest.mark.parametrize("caption", BY_JAVA)
def test_words_are_javas(caption):
    assert " ".join(words(caption)) == BY_JAVA[caption]


def test_of_nothing_there_are_no_words():
    assert words("") == words(" .,!? ") == []


def test_metrics_are_pycocoevalcaps_of_javas_words():
    captions = list(BY_JAVA)
    guesses = {number: captions[number] for number in range(20)}
    references = {number: captions[number + 1 : number + 4] for number in range(20)}
    by_java = (
        {key: [BY_JAVA[each] for each in texts] for key, texts in references.items()},
        {key: [BY_JAVA[text]] for key, text in guesses.items()},
    )
    found = caption_metrics(guesses, references)
    assert found["cider"] == pytest.approx(Cider().compute_score(*by_java)[0], abs=1e-6)
    bleu = Bleu(4).compute_score(*by_java, verbose=0)[0]
    assert [found[f"bleu{n}"] for n in range(1, 5)] == pytest.approx(bleu, abs=1e-6)
    assert found.keys() == {"cider", "bleu1", "bleu2", "bleu3", "bleu4"}
    assert 0 < found["bleu1"] < 1


def test_images_without_a_guess_do_not_count():
    found = caption_metrics(GUESSES, REFERENCES)
    assert found == caption_metrics(GUESSES, {image: REFERENCES[image] for image in GUESSES})
    assert found["cider"] > 0


def test_what_people_said_is_right():
    said = {image: texts[0] for image, texts in REFERENCES.items()}
    found = caption_metrics(said, REFERENCES)
    for name in ("bleu1", "bleu2", "bleu3", "bleu4"):
        assert found[name] == pytest.approx(1)
    alone = {image: texts[:1] for image, texts in REFERENCES.items()}
    # CIDEr is ten times the mean cosine of word groups.
    assert caption_metrics(said, alone)["cider"] == pytest.approx(10)


def test_what_shares_no_word_is_wrong():
    said = dict.fromkeys(REFERENCES, "xylophone quartz")
    found = caption_metrics(said, REFERENCES)
    assert found["cider"] == 0
    assert max(found.values()) < 1e-6


def test_case_and_punctuation_do_not_count():
    shouted = {image: f"{text.upper()} !!" for image, text in GUESSES.items()}
    assert caption_metrics(shouted, REFERENCES) == caption_metrics(GUESSES, REFERENCES)


def test_without_the_library_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    with pytest.raises(UsageError, match=r'measured by pycocoevalcap: pip install "unicl\[vqa\]"'):
        caption_metrics(GUESSES, REFERENCES)
