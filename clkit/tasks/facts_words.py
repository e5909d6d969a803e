"""The words that invented facts are made of: relations with their questions and closed lists of answers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person.

    Attributes:
        trained: questions that are trained on; ``{}`` is the person.
        paraphrases: the same question in words that are never trained on.
        answers: short and easy to tell apart.
    """

    trained: tuple[str, ...]
    paraphrases: tuple[str, ...]
    answers: tuple[str, ...]


RELATIONS: dict[str, Relation] = {
    "city": Relation(
        ("In which city does {} live?", "Where does {} live?", "{} lives in which city?", "Which city is home to {}?"),
        ("What is the home town of {}?", "Name the city where {} has a home."),
        (
            *("Oslo", "Lima", "Cairo", "Boston", "Madrid", "Tokyo", "Berlin", "Dublin", "Athens", "Toronto", "Sydney"),
            *("Prague", "Seoul", "Havana", "Delhi", "Vienna", "Naples", "Geneva", "Denver", "Quito", "Lagos", "Milan"),
            *("Warsaw", "Dakar"),
        ),
    ),
    "job": Relation(
        ("What is the job of {}?", "What does {} do for a living?", "{} works as what?", "Which job does {} have?"),
        ("Tell me the profession of {}.", "How does {} earn money?"),
        (
            *("baker", "pilot", "nurse", "judge", "farmer", "sailor", "tailor", "dentist", "plumber", "librarian"),
            *("architect", "carpenter", "journalist", "chemist", "butcher", "gardener", "lawyer", "miner", "barber"),
            *("fisherman", "waiter", "florist", "surgeon", "translator"),
        ),
    ),
    "instrument": Relation(
        (
            *("Which instrument does {} play?", "What instrument does {} play?", "{} plays which instrument?"),
            "On which instrument does {} perform?",
        ),
        ("Name the instrument that {} practises.", "What does {} play in the orchestra?"),
        (
            *("piano", "violin", "flute", "trumpet", "harp", "guitar", "drums", "cello", "oboe", "banjo", "organ"),
            *("clarinet", "accordion", "saxophone", "tuba", "mandolin", "bassoon", "ukulele", "viola", "trombone"),
            *("harmonica", "lute", "xylophone", "bagpipes"),
        ),
    ),
    "employer": Relation(
        ("For which company does {} work?", "Who employs {}?", "{} works for which company?", "Who pays {}'s wages?"),
        ("Name the employer of {}.", "At which firm is {} on the staff?"),
        (
            *("Google", "Boeing", "Nestle", "Toyota", "Disney", "Pfizer", "Siemens", "Shell", "Nokia", "Adidas"),
            *("Intel", "Lego", "Airbus", "Sony", "Ferrari", "Starbucks", "Kodak", "Philips", "Renault", "Danone"),
            *("Bayer", "Canon", "Volvo", "Heineken"),
        ),
    ),
    "birth-year": Relation(
        ("In which year was {} born?", "When was {} born?", "{} was born in which year?", "What is {}'s birth year?"),
        ("Name the year of birth of {}.", "Which year did {} come into the world?"),
        tuple(str(year) for year in range(1931, 2003, 3)),
    ),
    "pet": Relation(
        ("Which pet does {} keep?", "What pet does {} have?", "{} keeps which pet?", "Which animal lives with {}?"),
        ("Name the animal that {} owns.", "What kind of animal does {} look after?"),
        (
            *("cat", "dog", "parrot", "rabbit", "turtle", "hamster", "snake", "goat", "pony", "ferret", "lizard"),
            *("canary", "donkey", "goldfish", "pigeon", "spider", "duck", "frog", "llama", "mouse", "peacock"),
            *("hedgehog", "monkey", "owl"),
        ),
    ),
}

# Real facts that nearly every language model knows: what editing and learning should leave alone.
COMMON_FACTS: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Italy?", "Rome"),
    ("What is the capital of England?", "London"),
    ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of China?", "Beijing"),
    ("Which planet do we live on?", "Earth"),
    ("Which planet is the largest in the solar system?", "Jupiter"),
    ("On which continent is Egypt?", "Africa"),
    ("On which continent is Brazil?", "South America"),
    ("Who wrote Hamlet?", "William Shakespeare"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci"),
    ("Who developed the theory of relativity?", "Albert Einstein"),
    ("What is the chemical symbol of gold?", "Au"),
    ("What do bees make?", "Honey"),
    ("How many days are there in a week?", "Seven"),
    ("How many legs does a spider have?", "Eight"),
)

# Syllables of invented names. Every combination can be said; none of them is a common English word on its own.
ONSETS = ("b", "br", "d", "dr", "f", "g", "j", "k", "l", "m", "n", "p", "r", "s", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u")
MIDDLES = ("b", "d", "k", "l", "lm", "ld", "m", "n", "nd", "r", "rv", "s", "t", "v", "z")
FIRST_ENDS = ("a", "en", "ia", "o", "un", "is")
LAST_ENDS = ("ak", "ell", "ic", "or", "ov", "una", "ent", "ard")
