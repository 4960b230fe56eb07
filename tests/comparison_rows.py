"""Invented rows of MetaMathQA and GSM8K, the data of PEFT's method comparison."""


def metamath_row(i, response=None, query=None):
    return {
        "type": "GSM_Rephrased",
        "query": query or f"What is {i} and {i}?",
        "original_question": f"What are two times {i}?",
        "response": response or f"{i} + {i} = {2 * i}.\n#### {2 * i}\nThe answer is: {2 * i}",
    }


def gsm8k_row(i, split):
    return {
        "question": f"Of {split}, row {i}: how many?",
        "answer": f"There are <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}",
    }
