/** Something that went wrong, said to those who listen as well. */
export function Alert({ text, kind = "bad" }: { text: string; kind?: "bad" | "warn" }) {
  return (
    <div role="alert" class={text ? `alert ${kind}` : ""}>
      {text}
    </div>
  );
}
