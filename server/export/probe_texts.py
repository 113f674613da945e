"""A few fixed questions and answers, to measure an export on where a run had no central test records.

They are no test set: they show that two forms of one model compute the same, not that it is good.
"""

from __future__ import annotations

from common.prompts import Prompt

PROBES = tuple(
    Prompt(question, context, answer)
    for question, context, answer in (
        (
            "What is high blood pressure?",
            "",
            "Blood presses on the walls of the arteries more than it should, for a long time.",
        ),
        (
            "Summarise the note.",
            "Cough and fever for three days. Lungs clear. No shortness of breath.",
            "A short illness of the airways without signs of pneumonia.",
        ),
        (
            "Does the patient need a follow-up?",
            "Stitches were placed in the left forearm today.",
            "Yes, to take them out after about ten days.",
        ),
        ("Name two causes of tiredness.", "", "Too little sleep, and a lack of iron."),
        (
            "Which finding is abnormal?",
            "Pulse 72, temperature 39.4, oxygen saturation 98 percent.",
            "The temperature, which is a fever.",
        ),
        ("What does an electrocardiogram show?", "", "The electrical activity of the heart."),
    )
)
