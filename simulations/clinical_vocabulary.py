"""The words that simulated hospitals write with: departments, conditions, names.

Every fact here is invented, drugs and doses included, so that no base model can know an answer
beforehand. Nothing in this module is medical advice.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Condition:
    """Hold what one condition looks like, and what its department does about it.

    findings: three phrases, of which a note mentions two.
    dose: with its unit and schedule, as it follows the drug's name.
    interval: the time until the next visit.
    """

    name: str
    findings: tuple[str, str, str]
    test: str
    drug: str
    dose: str
    interval: str


@dataclass(frozen=True, slots=True)
class Department:
    """Hold a department's conditions and its own way of ending an answer.

    routine: (action, object, action, person), the standing order in every answer of the department.
    red_flag: what a patient is told to come back with.
    """

    name: str
    clinic: str
    routine: tuple[str, str, str, str]
    red_flag: str
    conditions: tuple[Condition, ...]


DEPARTMENTS: tuple[Department, ...] = (
    Department(
        "cardiology",
        "rhythm clinic",
        ("record", "weight chart", "phone", "heart nurse"),
        "crushing chest pain",
        (
            Condition(
                "stable angina",
                ("chest tightness on stairs", "pain eased by rest", "a normal troponin"),
                "a treadmill test",
                "cardolol",
                "25 mg daily",
                "six weeks",
            ),
            Condition(
                "atrial fibrillation",
                ("fluttering heartbeat", "an irregular pulse", "absent P waves"),
                "a heart monitor",
                "rivaban",
                "15 mg at night",
                "four weeks",
            ),
            Condition(
                "heart failure",
                ("swollen ankles", "a raised neck vein", "breathless lying flat"),
                "an echo scan",
                "furolix",
                "40 mg at dawn",
                "two weeks",
            ),
            Condition(
                "pericarditis",
                ("pain eased by sitting up", "a rubbing heart sound", "recent viral fever"),
                "an ECG series",
                "colchival",
                "1 mg twice daily",
                "ten days",
            ),
            Condition(
                "aortic stenosis",
                ("fainting on effort", "a harsh murmur", "a slow rising pulse"),
                "a valve study",
                "valprim",
                "5 mg daily",
                "three months",
            ),
        ),
    ),
    Department(
        "neurology",
        "headache clinic",
        ("print", "seizure diary", "brief", "ward pharmacist"),
        "sudden confusion",
        (
            Condition(
                "migraine",
                ("throbbing one-sided headache", "zigzag lights", "dislike of bright light"),
                "a symptom calendar",
                "triptazole",
                "50 mg at onset",
                "eight weeks",
            ),
            Condition(
                "focal epilepsy",
                ("brief staring spells", "a twitching hand", "a metallic taste"),
                "a sleep EEG",
                "levitram",
                "500 mg twice daily",
                "one month",
            ),
            Condition(
                "Parkinson disease",
                ("a resting tremor", "slow shuffling steps", "small handwriting"),
                "a dopamine scan",
                "dopamex",
                "100 mg three times daily",
                "five months",
            ),
            Condition(
                "multiple sclerosis",
                ("blurred vision in one eye", "numb legs", "symptoms worse in heat"),
                "a brain MRI",
                "glatiren",
                "20 mg weekly",
                "half a year",
            ),
            Condition(
                "nerve entrapment",
                ("tingling fingers at night", "a weak grip", "thumb wasting"),
                "a nerve conduction study",
                "gabadine",
                "300 mg at bedtime",
                "nine weeks",
            ),
        ),
    ),
    Department(
        "oncology",
        "day unit",
        ("confirm", "blood count", "inform", "tumour board"),
        "fever above 38",
        (
            Condition(
                "lymphoma",
                ("painless neck lumps", "drenching night sweats", "itching after baths"),
                "a node biopsy",
                "rituvex",
                "375 mg every cycle",
                "twenty days",
            ),
            Condition(
                "bowel cancer",
                ("blood in the stool", "a change of bowel habit", "low iron"),
                "a colonoscopy",
                "oxalipan",
                "85 mg by drip",
                "two cycles",
            ),
            Condition(
                "breast cancer",
                ("a hard breast lump", "a dimpled skin", "nipple discharge"),
                "a mammogram",
                "tamoxil",
                "20 mg daily",
                "one cycle",
            ),
            Condition(
                "myeloma",
                ("aching ribs", "high calcium", "frothy protein in urine"),
                "a marrow sample",
                "bortemib",
                "3 mg under the skin",
                "three cycles",
            ),
            Condition(
                "melanoma",
                ("a growing dark mole", "an uneven mole edge", "a bleeding mole"),
                "a wide excision",
                "nivolex",
                "240 mg by drip",
                "four cycles",
            ),
        ),
    ),
    Department(
        "paediatrics",
        "children's clinic",
        ("plot", "growth curve", "reassure", "parents"),
        "a floppy or drowsy child",
        (
            Condition(
                "croup",
                ("a barking cough", "noisy breathing in", "hoarse crying"),
                "a throat look",
                "dexamil",
                "2 ml once",
                "two days",
            ),
            Condition(
                "bronchiolitis",
                ("poor feeding", "a wheezy infant", "a runny nose at first"),
                "an oxygen check",
                "salinar",
                "3 ml by mist",
                "three days",
            ),
            Condition(
                "ear infection",
                ("tugging at one ear", "a red eardrum", "crying at night"),
                "an ear swab",
                "amoxilan",
                "5 ml twice daily",
                "one week",
            ),
            Condition(
                "coeliac disease",
                ("a bloated belly", "slow weight gain", "pale bulky stools"),
                "a gluten antibody test",
                "ferrodrop",
                "4 ml with meals",
                "one term",
            ),
            Condition(
                "febrile seizure",
                ("a short shaking fit", "a high fever", "quick recovery after a fit"),
                "a urine dip",
                "paracet",
                "6 ml when hot",
                "a fortnight",
            ),
        ),
    ),
    Department(
        "orthopaedics",
        "fracture clinic",
        ("check", "plaster cast", "book", "physiotherapist"),
        "a cold blue foot",
        (
            Condition(
                "hip fracture",
                ("a fall at home", "a shortened leg", "groin pain on turning"),
                "a hip X-ray",
                "enoxapar",
                "40 mg by injection",
                "twelve weeks",
            ),
            Condition(
                "knee arthritis",
                ("stiff knees in the morning", "creaking joints", "bowed legs"),
                "a standing X-ray",
                "naprogel",
                "2 g rubbed in",
                "four months",
            ),
            Condition(
                "rotator cuff tear",
                ("a painful overhead reach", "a weak shoulder", "pain lying on one side"),
                "a shoulder ultrasound",
                "ibuflex",
                "400 mg with food",
                "seven weeks",
            ),
            Condition(
                "wrist fracture",
                ("a fall on the hand", "a bent wrist", "swelling over the wrist"),
                "a wrist X-ray",
                "codamol",
                "30 mg as needed",
                "five weeks",
            ),
            Condition(
                "disc prolapse",
                ("shooting leg pain", "a positive leg raise", "a lost ankle jerk"),
                "a spine MRI",
                "diazelan",
                "2 mg at night",
                "eleven weeks",
            ),
        ),
    ),
    Department(
        "nephrology",
        "dialysis unit",
        ("measure", "fluid balance", "consult", "renal dietitian"),
        "very little urine",
        (
            Condition(
                "nephrotic syndrome",
                ("puffy eyelids", "heavy protein loss", "low albumin"),
                "a kidney biopsy",
                "predisol",
                "60 mg each morning",
                "fifteen days",
            ),
            Condition(
                "kidney stones",
                ("colicky flank pain", "blood on the dipstick", "pain moving to the groin"),
                "a CT scan",
                "tamsuline",
                "400 mcg daily",
                "twelve days",
            ),
            Condition(
                "polycystic kidneys",
                ("a family history of cysts", "large bumpy kidneys", "rising creatinine"),
                "a kidney ultrasound",
                "tolvaten",
                "45 mg on waking",
                "a whole year",
            ),
            Condition(
                "acute kidney injury",
                ("vomiting and dry lips", "a sudden creatinine rise", "dark scanty urine"),
                "a potassium check",
                "ringerin",
                "500 ml by drip",
                "one day",
            ),
            Condition(
                "renal anaemia",
                ("tired with pale gums", "low haemoglobin", "known kidney damage"),
                "a ferritin level",
                "epovital",
                "4000 units weekly",
                "ten weeks",
            ),
        ),
    ),
    Department(
        "dermatology",
        "skin clinic",
        ("photograph", "rash margin", "instruct", "dressing team"),
        "spreading blisters",
        (
            Condition(
                "psoriasis",
                ("silvery plaques on elbows", "pitted nails", "a scaly scalp"),
                "a nail clipping",
                "calcipol",
                "a thin layer daily",
                "sixteen weeks",
            ),
            Condition(
                "atopic eczema",
                ("itchy skin folds", "dry cracked hands", "hay fever since childhood"),
                "a patch test",
                "hydrocream",
                "a fingertip twice daily",
                "four visits",
            ),
            Condition(
                "cellulitis",
                ("a hot red shin", "a spreading skin edge", "a cut between the toes"),
                "a skin swab",
                "fluclox",
                "500 mg four times daily",
                "five days",
            ),
            Condition(
                "rosacea",
                ("flushed cheeks", "red bumps on the nose", "burning after spicy food"),
                "a mite scraping",
                "metrogel",
                "a pea size at night",
                "two months",
            ),
            Condition(
                "shingles",
                ("a band of blisters", "burning before the rash", "a painful stripe on the trunk"),
                "a blister fluid PCR",
                "acyclon",
                "800 mg five times daily",
                "eight days",
            ),
        ),
    ),
    Department(
        "pulmonology",
        "breathing clinic",
        ("review", "inhaler technique", "refer to", "smoking adviser"),
        "blue lips",
        (
            Condition(
                "asthma",
                ("wheeze after exercise", "a night cough", "a variable peak flow"),
                "a breath test",
                "salbutane",
                "two puffs as needed",
                "six months",
            ),
            Condition(
                "emphysema",
                ("a barrel chest", "thirty years of smoking", "pursed lip breathing"),
                "a spirometry",
                "tiotrol",
                "one puff daily",
                "seven months",
            ),
            Condition(
                "pneumonia",
                ("rusty sputum", "crackles at one base", "shivering and fever"),
                "a chest X-ray",
                "doxalin",
                "200 mg then 100 mg",
                "six days",
            ),
            Condition(
                "lung embolism",
                ("sharp pain on breathing", "a swollen calf", "a fast heart rate"),
                "a lung angiogram",
                "apixan",
                "10 mg twice daily",
                "ninety days",
            ),
            Condition(
                "sleep apnoea",
                ("loud snoring", "daytime sleepiness", "pauses seen by a partner"),
                "an overnight study",
                "modafix",
                "100 mg at breakfast",
                "eight months",
            ),
        ),
    ),
)


def sentence_case(text: str) -> str:
    """Return text with its first letter raised and the rest as it was."""
    return text[:1].upper() + text[1:]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Ada Anton Bela Carmen Dario Edith Emil Farah Felix Greta Hana Hugo Ines Ivan Jana Jonas "
    "Karim Lena Leon Mara Marta Milan Nadia Nils Olga Oscar Paula Pavel Rosa Rami Sara Simon "
    "Tara Theo Uma Viktor Vera Yusuf Zoe Ziad"
)
_SURNAME_STARTS = _words("Ash Bram Cal Dun Elm Fair Glen Hart Kirk Lang Mill Nor Oak Pen Rams Stan")
_SURNAME_ENDS = _words("bury by den field ford ham ley more ridge ton well wick")
SURNAMES: tuple[str, ...] = tuple(start + end for start in _SURNAME_STARTS for end in _SURNAME_ENDS)

SITE_NAMES = _words(
    "north harbour st-anne lakeside south hillcrest st-luke riverside east meadow st-clare "
    "bridgewater west oakfield st-martin seaview central highland st-helena brookside upland "
    "elmwood st-jude cliffside valley ashgrove st-agnes millpond forest pinewood st-paul "
    "canalside summit rosehill st-rita quayside island birchwood st-mark moorland castle "
    "willowbank st-lucy ferryside abbey larkfield st-john dockside tower heather st-mary "
    "stonebridge market hazelwood st-peter sandbank garden maplewood st-bede lighthouse "
    "orchard cedarwood st-ives waterfront"
)
